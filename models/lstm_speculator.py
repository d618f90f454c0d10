"""Arctic's LSTM speculator (arXiv 2507.11830): its heads pass on a state and a cell.

Pure; runs inside the step program. What differs from `speculator.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from arctic_jax.errors import UnsupportedModelError
from arctic_jax.models.layers import parameter
from arctic_jax.models.speculator import (
    Speculator,
    SpeculatorConfig,
    SpeculatorNorm,
    State,
    at,
    dimension,
    norm_sources,
    product,
)
from arctic_jax.weights import RowBlocks, Source

GATES = ("forget", "input", "output", "cell")


class ArcticLSTMSpeculator(Speculator):
    """The method `sum_lstm`: gates are made of the projected state plus the scaled embedding."""

    input_key = "input_hidden_dim"
    embedding_names = tuple(f"{gate}_emb" for gate in GATES)

    def __init__(self, config: SpeculatorConfig, num_devices: int) -> None:
        super().__init__(config, num_devices, copies=1 if config.tie_gates else len(GATES))
        inner = config.inner_size
        rows = len(GATES) * inner
        self.projections = nnx.List([parameter(rows, size) for size in self.projected_sizes])
        self.cell_norms = nnx.List([SpeculatorNorm(inner) for _ in range(self.num_tied)])
        self.state_norms = nnx.List([SpeculatorNorm(inner) for _ in range(self.num_tied)])

    @classmethod
    def config_from_hf(cls, config: Mapping[str, Any]) -> SpeculatorConfig:
        """Read the config of an `ArcticLSTMSpeculatorPreTrainedModel`.

        Raises:
            UnsupportedModelError: see `SpeculatorConfig.from_hf`; or its dimensions differ.
        """
        method = config.get("method", "sum_lstm")
        if method != "sum_lstm":
            raise UnsupportedModelError(
                f"a speculator of method {method!r} is not supported, only 'sum_lstm'"
            )
        found = SpeculatorConfig.from_hf(config, cls.input_key)
        for key in ("proj_dim", "emb_dim"):
            if key in config and dimension(config, key) != found.inner_size:
                raise UnsupportedModelError(
                    f"a speculator with {key}={config[key]!r} is not supported: its method adds "
                    f"what must have inner_dim={found.inner_size} entries"
                )
        return found

    def start(self, hidden: Array) -> State:
        """Make the first state, with an empty cell."""
        shape = (*hidden.shape[:-1], self.config.inner_size)
        return *super().start(hidden), jnp.zeros(shape, hidden.dtype)

    def advance(self, k: int, state: State, embedded: Array) -> tuple[Array, State]:
        """See `Speculator`."""
        hidden, cell = state
        gates = product(hidden, at(self.projections, k)[...])
        times = gates.shape[-1] // embedded.shape[-1]
        gates += self.config.token_scale * jnp.concatenate([embedded] * times, axis=-1)
        hidden, cell = lstm_cell(gates, cell, at(self.cell_norms, k), at(self.state_norms, k))
        return hidden, (hidden, cell)

    def weight_sources(self) -> dict[str, Source]:
        """Say, for each parameter's path, which checkpoint tensors it is read from."""
        sources = super().weight_sources()
        for i in range(len(self.projections)):
            sources[f"projections.{i}"] = RowBlocks(
                tuple(f"{gate}_proj.{i}.weight" for gate in GATES)
            )
        sources |= norm_sources("cell_norms", "cell_ln", self.num_tied)
        return sources | norm_sources("state_norms", "state_ln", self.num_tied)


def lstm_cell(
    gates: Array, cell: Array, cell_norm: SpeculatorNorm, state_norm: SpeculatorNorm
) -> tuple[Array, Array]:
    """One step of the cell, in float32.

    The cell is kept in its own type, and the state is made of the cell as it is kept; but the root
    mean square that it is divided by is that before rounding.

    Args:
        gates: `[S, 4 * inner]` float32: forget, input, output, candidate.
        cell: `[S, inner]`.
        cell_norm: of the candidate.
        state_norm: of the new cell.

    Returns:
        State and cell `[S, inner]`, of the cell's type.
    """
    forget, write, output, candidate = jnp.split(gates, 4, axis=-1)
    candidate = jax.nn.gelu(cell_norm(candidate), approximate=False)
    exact = jax.nn.sigmoid(forget) * cell.astype(jnp.float32) + jax.nn.sigmoid(write) * candidate
    kept = exact.astype(cell.dtype)
    shown = jax.nn.gelu(state_norm(kept, exact), approximate=False)
    return (jax.nn.sigmoid(output) * shown).astype(cell.dtype), kept
