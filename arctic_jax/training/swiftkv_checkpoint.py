"""From an ordinary checkpoint to its SwiftKV form. Host only, no jax.

Names and initial values are those of Snowflake's ArcticTraining, so that its checkpoints load here
and ours load there. A student is a directory like any other model's: config, tokenizer, weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from arctic_jax.config import LoadConfig, ModelConfig
from arctic_jax.errors import CheckpointError, UnsupportedModelError
from arctic_jax.loading.model_files import (
    ModelFiles,
    new_directory,
    open_model,
    save_all_but_weights,
)
from arctic_jax.loading.safetensors_checkpoint import INDEX
from arctic_jax.models.registry import model_class
from arctic_jax.progress import Report, counted, silent
from arctic_jax.weights import Checkpoint

STUDENTS = {
    "LlamaForCausalLM": ("LlamaSwiftKVForCausalLM", "llama_swiftkv"),
    "Qwen2ForCausalLM": ("Qwen2SwiftKVForCausalLM", "qwen2_swiftkv"),
}
NORM = "model.norm_swiftkv.weight"
FILE_BYTES = 4 * 2**30
"""Of one file of weights, about."""

Tensors = Mapping[str, np.ndarray[Any, Any]]


def student_config(config: Mapping[str, Any], lower: int, group: int = 1) -> dict[str, Any]:
    """Return the `config.json` of a model's SwiftKV form.

    Args:
        config: of the ordinary model.
        lower: l, layers that run on every token (`num_key_value_layers`).
        group: g, upper layers that share keys and values (`key_value_group_size`).

    Raises:
        UnsupportedModelError: the architecture has no SwiftKV form, or the numbers do not fit.
    """
    names = config.get("architectures") or []
    if len(names) != 1 or names[0] not in STUDENTS:
        raise UnsupportedModelError(
            f"architectures {names} have no SwiftKV form; those that do: {sorted(STUDENTS)}"
        )
    architecture, model_type = STUDENTS[names[0]]
    changed = {
        **config,
        "architectures": [architecture],
        "model_type": model_type,
        "swiftkv": True,
        "num_key_value_layers": lower,
        "key_value_group_size": group,
    }
    model_class(changed).config_from_hf(changed)
    return changed


def initial_values(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, np.ndarray[Any, Any]]:
    """Return a student's own tensors as they begin, float32 (arXiv 2410.03960 and ArcticTraining).

    The norm is that before the first upper layer's attention; each query projection is its layer's;
    keys and values are the means over the layers of their group.

    Args:
        checkpoint: of the ordinary model.
        config: of the student.
    """
    lower, layers = config.num_lower_layers, config.num_hidden_layers
    if lower == layers:
        return {}

    def read(layer: int, name: str) -> np.ndarray[Any, Any]:
        return checkpoint.read(f"model.layers.{layer}.{name}").astype(np.float32)

    values = {NORM: read(lower, "input_layernorm.weight")}
    kinds = ("weight", "bias") if config.qkv_bias else ("weight",)
    for layer in range(lower, layers):
        there = f"model.layers.{layer}.self_attn"
        group = range(layer, layer + config.key_value_group_size)
        for kind in kinds:
            values[f"{there}.q_proj_swiftkv.{kind}"] = read(layer, f"self_attn.q_proj.{kind}")
            if (layer - lower) % config.key_value_group_size == 0:
                for p in "kv":
                    of_group = [read(member, f"self_attn.{p}_proj.{kind}") for member in group]
                    values[f"{there}.{p}_proj_swiftkv.{kind}"] = np.mean(of_group, axis=0)
    return values


def convert(
    load: LoadConfig,
    directory: Path,
    lower: int,
    group: int = 1,
    parameters: Path | None = None,
    report: Report = silent,
) -> None:
    """Write the SwiftKV form of a model into a new directory.

    Args:
        load: which model; dtype "auto" leaves the weights as they are.
        directory: must not exist. It appears when everything is in it.
        lower: see `student_config`.
        group: likewise.
        parameters: a safetensors file with the student's own tensors, as `distill` writes it;
            `None` for their initial values.
        report: told how far it is.

    Raises:
        FileExistsError: there is something at `directory`.
        CheckpointError: the model has no original weights, or `parameters` are not this student's.
        ModelNotFoundError, UnsupportedModelError: see `arctic_jax.errors`.
    """
    files = open_model(load, report)
    checkpoint = original_weights(files)
    config = student_config(files.config, lower, group)
    own = initial_values(checkpoint, model_class(config).config_from_hf(config))
    if parameters is not None:
        found = load_file(parameters)
        if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in own.items()}:
            raise CheckpointError(
                f"{parameters} does not hold the tensors of a student with "
                f"num_key_value_layers={lower} and key_value_group_size={group} of {load.model}"
            )
        own = found
    write_student(files, config, own, directory, load.dtype, report)


def original_weights(files: ModelFiles) -> Checkpoint:
    """Return a model's checkpoint, if it holds tensors by Hugging Face's names.

    Raises:
        CheckpointError: it does not.
    """
    checkpoint = files.checkpoint
    if checkpoint is None or not hasattr(checkpoint, "read"):
        raise CheckpointError(f"{files.directory} has no original weights")
    return checkpoint  # pyright: ignore[reportReturnType]


def write_student(
    files: ModelFiles,
    config: Mapping[str, Any],
    own: Tensors,
    directory: Path,
    dtype: str = "auto",
    report: Report = silent,
) -> None:
    """Write a student: the ordinary model's tensors that it keeps, and its own.

    Args:
        files: of the ordinary model.
        config: of the student, see `student_config`.
        own: the student's own tensors.
        directory: must not exist. It appears when everything is in it.
        dtype: of all tensors; "auto" for that of the ordinary model.
        report: told how far it is.

    Raises:
        FileExistsError: there is something at `directory`.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} already exists")
    checkpoint = original_weights(files)
    model = model_class(config).config_from_hf(config)
    dtype = model.checkpoint_dtype if dtype == "auto" else dtype
    kept = [name for name in checkpoint if not _is_replaced(name, model)]
    advance = counted(report, "Writing weights", len(kept) + len(own))

    def tensors() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        for name in (*kept, *own):
            tensor = own[name] if name in own else checkpoint.read(name)
            yield name, np.ascontiguousarray(tensor, _numpy_dtype(dtype))
            advance()

    with new_directory(directory) as made:
        save_all_but_weights(_with_config(files, config), made, dtype)
        _save(made, tensors())


def save_own(own: Tensors, file: Path, dtype: str = "bfloat16") -> None:
    """Write a student's own tensors alone: what `convert` takes as `parameters`."""
    tensors = {name: np.asarray(tensor).astype(_numpy_dtype(dtype)) for name, tensor in own.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _is_replaced(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of the ordinary model is a projection that the student does not use."""
    prefix, _, rest = name.removeprefix("model.layers.").partition(".")
    if not name.startswith("model.layers.") or int(prefix) < config.num_lower_layers:
        return False
    return rest.startswith(("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."))


def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _with_config(files: ModelFiles, config: Mapping[str, Any]) -> ModelFiles:
    return ModelFiles(
        config, files.checkpoint, files.tokenizer, files.generation_config, files.directory
    )


def _save(directory: Path, tensors: Iterable[tuple[str, np.ndarray[Any, Any]]]) -> None:
    """Write tensors into files of about `FILE_BYTES` and the index that says which is where."""
    where: dict[str, str] = {}
    part: dict[str, np.ndarray[Any, Any]] = {}
    total = 0

    def flush() -> None:
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
        part.clear()

    for name, tensor in tensors:
        part[name] = tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in part.values()) > FILE_BYTES:
            flush()
    if part:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
