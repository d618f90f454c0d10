"""A model's files, opened: config, weights, tokenizer, generation defaults. Host only.

A directory may hold just what it has beyond another model, which its config names under
`base_model_name_or_path`: keys of `config.json` that differ, and tensors. The rest is the other's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arctic_jax.config import LoadConfig
from arctic_jax.errors import CheckpointError
from arctic_jax.loading.gguf_checkpoint import GGUFCheckpoint
from arctic_jax.loading.hub import TOKENIZER_FILES, resolve_model
from arctic_jax.loading.orbax_checkpoint import MANIFEST, OrbaxCheckpoint
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.loading.tokenizer import Tokenizer, load_tokenizer, numbered_tokenizer
from arctic_jax.progress import Report, silent
from arctic_jax.weights import Checkpoint, Overlaid

BASE_MODEL = "base_model_name_or_path"


@dataclass(frozen=True)
class ModelFiles:
    """What an engine needs of a model.

    Attributes:
        config: in the form of a Hugging Face `config.json`.
        checkpoint: its weights; `None` for random ones.
        tokenizer: its tokenizer.
        generation_config: `generation_config.json`, empty if there is none.
        directory: where the files are; `None` if they are not in a directory.
    """

    config: Mapping[str, Any]
    checkpoint: Checkpoint | OrbaxCheckpoint | None
    tokenizer: Tokenizer
    generation_config: Mapping[str, Any]
    directory: Path | None = None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """All tokens that end an answer."""
        ids: set[int] = set()
        for source in (self.generation_config, self.config):
            value = source.get("eos_token_id")
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)


def open_model(load: LoadConfig, report: Report = silent) -> ModelFiles:
    """Find a model's files (downloading them if need be) and open them.

    With `load_format="dummy"` a directory with a `config.json` is enough.

    Raises:
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
    """
    path = resolve_model(load.model, load.revision, report)
    dummy = load.load_format == "dummy"
    if path.is_dir() and BASE_MODEL in (config := _read_json(path / "config.json")):
        return _over_base(path, config, load, report)
    if path.is_file():
        gguf = GGUFCheckpoint(path)
        config, generation_config = gguf.config(), {}
    else:
        gguf = None
        config = _read_json(path / "config.json")
        optional = path / "generation_config.json"
        generation_config = _read_json(optional) if optional.exists() else {}
    if load.tokenizer is not None:
        tokenizer = load_tokenizer(resolve_model(load.tokenizer, None, report))
    elif dummy and path.is_dir() and not (path / "tokenizer.json").exists():
        tokenizer = numbered_tokenizer(int(config["vocab_size"]))
    else:
        tokenizer = load_tokenizer(path)
    directory = path if path.is_dir() else None
    if dummy:
        checkpoint = None
    elif (path / MANIFEST).is_file():
        checkpoint = OrbaxCheckpoint(path)
    else:
        checkpoint = gguf or SafetensorsCheckpoint(path)
    return ModelFiles(config, checkpoint, tokenizer, generation_config, directory)


def _over_base(
    path: Path, config: Mapping[str, Any], load: LoadConfig, report: Report
) -> ModelFiles:
    """Open a directory that holds what it has beyond another model."""
    name = str(config[BASE_MODEL])
    base = open_model(replace(load, model=name, revision=None), report)
    if BASE_MODEL in base.config:
        raise CheckpointError(f"{path} is based on {name}, which is based on another model itself")
    checkpoint = base.checkpoint
    if checkpoint is not None:
        if isinstance(checkpoint, OrbaxCheckpoint):
            raise CheckpointError(f"{path} is based on {name}, which has no original weights")
        checkpoint = Overlaid(SafetensorsCheckpoint(path), checkpoint)
    return replace(base, config={**base.config, **config}, checkpoint=checkpoint)


def open_weights(
    model: str, revision: str | None, dummy: bool, report: Report = silent
) -> tuple[dict[str, Any], Checkpoint | None]:
    """Find what has weights but no tokenizer, and return its config and checkpoint.

    Args:
        model: a directory, or a hub id.
        revision: on the hub.
        dummy: whether the config is enough; then there is no checkpoint.
        report: told how far downloading is.

    Raises:
        ModelNotFoundError, CheckpointError: see `arctic_jax.errors`.
    """
    path = resolve_model(model, revision, report)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory with a config.json")
    config = _read_json(path / "config.json")
    return config, None if dummy else SafetensorsCheckpoint(path)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `directory` when everything is in it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}-new-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=directory.parent) as room:
        made = Path(room) / directory.name
        yield made
        os.rename(made, directory)


def save_all_but_weights(files: ModelFiles, directory: Path, dtype: str) -> None:
    """Write config, generation defaults and tokenizer into a new directory.

    Args:
        files: of a model.
        directory: must not exist.
        dtype: of the weights that will be beside them; the config names it.
    """
    directory.mkdir(parents=True)
    _write_json(directory / "config.json", {**files.config, "dtype": dtype})
    if files.generation_config:
        _write_json(directory / "generation_config.json", files.generation_config)
    if files.directory is None:
        files.tokenizer.hf.save_pretrained(str(directory))
        return
    for pattern in TOKENIZER_FILES:
        for file in files.directory.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
