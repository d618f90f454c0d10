"""A tiny BERT with tokenizer and the files of sentence-transformers, for the tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arctic_jax.testing import TINY_VOCAB_SIZE, write_model

CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": TINY_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
PROMPTS = {"query": "query: ", "document": ""}
_MODULE = "sentence_transformers.models."


def write(
    directory: Path,
    pooling: str = "mean_tokens",
    normalize: bool = True,
    config: Mapping[str, Any] = CONFIG,
    **settings: Any,
) -> Path:
    """Write the model; a byte is a token. `settings` are those of `sentence_bert_config.json`."""
    write_model(directory, config, seed=3)
    modules = [
        {"path": "", "type": f"{_MODULE}Transformer"},
        {"path": "1_Pooling", "type": f"{_MODULE}Pooling"},
    ]
    modules += [{"path": "2_Normalize", "type": f"{_MODULE}Normalize"}] if normalize else []
    (directory / "1_Pooling").mkdir()
    for name, value in {
        "modules.json": modules,
        "1_Pooling/config.json": {f"pooling_mode_{pooling}": True},
        "config_sentence_transformers.json": {"prompts": PROMPTS},
        "sentence_bert_config.json": settings,
    }.items():
        (directory / name).write_text(json.dumps(value))
    return directory
