"""The tiny model as a directory on disk, with a tokenizer of one character a token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tiny_engine import CONFIG, make_tensors
from transformers import PreTrainedTokenizerFast

EOS = 96
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


def decode(ids: list[int]) -> str:
    """Text of these tokens; the end of a sequence is not shown."""
    return "".join(CHARACTERS[i] for i in ids if i != EOS)


def write_checkpoint(
    directory: Path,
    config: dict[str, Any] = CONFIG,
    tensors: dict[str, np.ndarray] | None = None,
    generation_config: dict[str, Any] | None = None,
) -> Path:
    """Write what Hugging Face would. The tokenizer knows one character more than the model."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(make_tensors(config) if tensors is None else tensors, directory / "model.safetensors")
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    vocabulary = {c: i for i, c in enumerate([*CHARACTERS, "<eos>", "§"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.decoder = tokenizers.decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    made.chat_template = CHAT_TEMPLATE
    made.save_pretrained(directory)
    return directory
