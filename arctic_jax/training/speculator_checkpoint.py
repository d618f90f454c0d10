"""Speculators' checkpoints: a config for a model, initial values, and the published names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from arctic_jax.config import ModelConfig
from arctic_jax.models.layers import named_parameters
from arctic_jax.models.speculator import Speculator
from arctic_jax.weights import RowBlocks

Tensors = Mapping[str, np.ndarray[Any, Any]]


def speculator_config(
    base: ModelConfig, kind: str, inner_size: int, n_predict: int, shares: bool
) -> dict[str, Any]:
    """Return the `config.json` of a new speculator, in the form of the published ones.

    Args:
        base: the model that it is for.
        kind: "lstm" or "mlp".
        inner_size: of its states.
        n_predict: tokens of a draft.
        shares: whether it embeds by the model's embedding and a projection, and ends in a
            projection and the model's head: `share_base_embedding` and `share_base_head`, keys of
            ours. Each gate of an LSTM then has its own projection, which costs little.

    Raises:
        ValueError: there is no such kind.
    """
    config: dict[str, Any] = {
        "model_type": "mlp_speculator",
        "base_model_archs": [base.architecture.replace("SwiftKV", "")],
        "inner_dim": inner_size,
        "n_predict": n_predict,
        "num_lookahead_tokens": n_predict,
        "n_candidates": 1,
        "top_k_tokens_per_head": [1] * n_predict,
        "vocab_size": base.vocab_size,
        "tie_weights": True,
        "scale_input": True,
        "share_base_embedding": shares,
        "share_base_head": shares,
        "torch_dtype": "bfloat16",
    }
    if kind == "mlp":
        return config | {
            "architectures": ["ArcticMLPSpeculatorPreTrainedModel"],
            "emb_dim": base.hidden_size,
        }
    if kind == "lstm":
        return config | {
            "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
            "input_hidden_dim": base.hidden_size,
            "proj_dim": inner_size,
            "emb_dim": inner_size,
            "tie_lstm_embs": not shares,
            "method": "sum_lstm",
        }
    raise ValueError(f"a speculator's kind must be lstm or mlp, got {kind!r}")


def initial_values(speculator: Speculator, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return parameters as they begin, float32, by their paths (as ArcticTraining has it).

    Matrices are normal with deviation 1/√(their smaller dimension), norms are ones and zeros.

    Args:
        speculator: without its parameters.
        seed: of the matrices.
    """
    values = {}
    rng = np.random.default_rng(seed)
    for path, parameter in named_parameters(speculator).items():
        shape = parameter.shape
        if len(shape) == 1:
            values[path] = np.full(shape, float(path.endswith("weight")), np.float32)
        else:
            matrix = rng.standard_normal(shape, np.float32)
            values[path] = matrix / np.sqrt(min(shape), dtype=np.float32)
    return values


def checkpoint_tensors(speculator: Speculator, values: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """Return parameters, given by their paths, by the names of the published checkpoints."""
    sources, tensors = speculator.weight_sources(), {}
    for path, parameter in named_parameters(speculator).items():
        value, source = np.asarray(values[path]), sources[path]
        if parameter.get_metadata("axis") == "vocab":  # it may be padded
            value = value[: speculator.config.vocab_size]
        parts = np.split(value, len(source.names)) if isinstance(source, RowBlocks) else [value]
        tensors |= dict(zip(source.names, parts, strict=True))
    return tensors


def save(
    config: Mapping[str, Any], tensors: Tensors, directory: Path, dtype: Any = ml_dtypes.bfloat16
) -> int:
    """Write a speculator for `speculative_config`'s `model`; return its parameters.

    Args:
        config: see `speculator_config`.
        tensors: by the published names.
        directory: made if need be.
        dtype: of all tensors; `None` leaves them as they are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", "utf-8")
    written = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in tensors.items()}
    save_file(written, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.size for tensor in tensors.values())
