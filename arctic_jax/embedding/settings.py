"""How a model wants to be used, as the files of `sentence-transformers` beside it say. Host only.

Read are `modules.json` (which steps follow the encoder), the pooling's `config.json`,
`config_sentence_transformers.json` (prompts), and `sentence_bert_config.json` (the longest text).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arctic_jax.embedding.pooling import Pooling
from arctic_jax.errors import CheckpointError, InvalidRequestError, UnsupportedModelError

_POOLINGS: Mapping[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_OLD_MODES = {  # before sentence-transformers 6: one key for each mode
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class EmbeddingSettings:
    """What follows the encoder, and what precedes it.

    Attributes:
        pooling: how a text's tokens become one vector.
        normalize: whether vectors get the length 1.
        prompts: texts to put before a text, by name, such as "query" and "document".
        default_prompt_name: of the prompt that is used when none is asked for.
        max_length: tokens of the longest text that the model was made for; `None` if only the
            encoder's positions limit it.
    """

    pooling: Pooling = "mean"
    normalize: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    max_length: int | None = None

    @classmethod
    def read(cls, directory: Path) -> EmbeddingSettings:
        """Read a model's directory. Without `modules.json`: the mean, as it is.

        Raises:
            UnsupportedModelError: a module or a pooling is not implemented.
            CheckpointError: a file cannot be read.
        """
        pooling, normalize, encoder = "mean", False, directory
        modules = directory / "modules.json"
        for module in _read(modules) if modules.is_file() else []:
            kind = str(module.get("type", "")).rpartition(".")[2]
            if kind == "Transformer":
                encoder = _inside(directory, module)
            elif kind == "Pooling":
                pooling = _pooling(_read(_inside(directory, module) / "config.json"))
            elif kind == "Normalize":
                normalize = True
            else:
                raise UnsupportedModelError(f"{modules} has a module {module.get('type')!r}")
        if encoder != directory:
            raise UnsupportedModelError(f"the encoder is in {encoder}, not in {directory}")
        prompts = _optional(directory / "config_sentence_transformers.json")
        limits = _optional(directory / "sentence_bert_config.json")
        return cls(
            pooling=pooling,
            normalize=normalize,
            prompts=dict(prompts.get("prompts") or {}),
            default_prompt_name=prompts.get("default_prompt_name"),
            max_length=limits.get("max_seq_length"),
        )

    def prompt(self, name: str | None) -> str:
        """Return the prompt of that name; without one the default, which may be empty.

        Raises:
            InvalidRequestError: there is no such prompt.
        """
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise InvalidRequestError(
                f"there is no prompt {name!r}; the model has {sorted(self.prompts)}", "prompt_name"
            )
        return self.prompts[name]


def _pooling(config: Mapping[str, Any]) -> Pooling:
    old = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    modes = [_OLD_MODES.get(key, key) for key in old]
    if "pooling_mode" in config:
        modes = [str(config["pooling_mode"])]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UnsupportedModelError(f"pooling {modes} is not supported: {sorted(_POOLINGS)}")
    if config.get("include_prompt") is False:
        raise UnsupportedModelError("include_prompt=false: prompts that are not pooled")
    return _POOLINGS[modes[0]]


def _inside(directory: Path, module: Mapping[str, Any]) -> Path:
    """Return a module's folder. Its name is input from elsewhere: it must not lead outside."""
    path = directory / str(module.get("path", ""))
    if not path.resolve().is_relative_to(directory.resolve()):
        raise CheckpointError(f"{directory / 'modules.json'} names {module.get('path')!r}")
    return path


def _optional(path: Path) -> dict[str, Any]:
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
