"""Writes a model as the engine holds it, for `OrbaxCheckpoint`. A command of its own; CPUs only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from arctic_jax import weights
from arctic_jax.config import LoadConfig, ModelConfig
from arctic_jax.errors import CheckpointError
from arctic_jax.loading import orbax_checkpoint
from arctic_jax.loading.model_files import new_directory, open_model, save_all_but_weights
from arctic_jax.models.layers import named_parameters
from arctic_jax.models.registry import model_class
from arctic_jax.progress import Report, counted, passing, silent
from arctic_jax.shift_parallel import make_mesh, shift
from arctic_jax.weights import ParameterSpec

USUAL_DEVICES = 8
"""Of one host. What is fused for them also serves 1, 2 and 4."""


def convert(
    load: LoadConfig, directory: Path, num_devices: int | None = None, report: Report = silent
) -> None:
    """Write a model into a new directory that can be loaded like any other.

    Args:
        load: which model; dtype "auto" leaves the weights as they are.
        directory: must not exist. It appears when everything is in it.
        num_devices: P, for which weights are fused; `None` for `usual_devices`.
        report: told how far it is.

    Raises:
        FileExistsError: there is something at `directory`.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
        ValueError: the model cannot be split over P devices.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} already exists")
    files = open_model(load, report)
    cls = model_class(files.config)
    config = cls.config_from_hf(files.config)
    num_devices = num_devices or usual_devices(config)
    dtype = config.checkpoint_dtype if load.dtype == "auto" else load.dtype
    model = nnx.eval_shape(lambda: cls(config, num_devices))
    checkpoint = files.checkpoint
    if checkpoint is None or isinstance(checkpoint, orbax_checkpoint.OrbaxCheckpoint):
        raise CheckpointError(f"{load.model} has no original weights to convert")

    # On a mesh of CPU devices, so that the rows of each of the P devices are one piece on disk.
    devices = jax.devices("cpu")
    mesh = make_mesh(1, math.gcd(num_devices, len(devices)), devices)
    layout = shift(1, mesh.size)
    parameters = {
        path: ParameterSpec(
            variable.shape, jnp.dtype(dtype), layout.partition(variable.get_metadata("axis"))
        )
        for path, variable in named_parameters(model).items()
    }
    sources = model.weight_sources()
    advance = counted(report, "Converting weights", len(parameters))

    def placed() -> Iterator[dict[str, jax.Array]]:
        for _, paths in orbax_checkpoint.parts(parameters):
            specs = {path: parameters[path] for path in paths}
            yield dict(passing(weights.load(specs, sources, checkpoint, mesh), advance))

    manifest = orbax_checkpoint.Manifest(
        model_type=str(files.config.get("model_type")),
        dtype=dtype,
        num_devices=num_devices,
        num_kv_copies=model.num_kv_groups // config.num_key_value_heads,
        shapes={path: spec.shape for path, spec in parameters.items()},
    )
    with new_directory(directory) as made:
        save_all_but_weights(files, made, dtype)
        orbax_checkpoint.write(made, placed(), manifest)


def usual_devices(config: ModelConfig) -> int:
    """Return how many devices to fuse for: those of a host, if no key/value head must be copied."""
    return math.gcd(USUAL_DEVICES, config.num_key_value_heads, config.intermediate_size)
