"""The MLP speculator (Wertheimer et al. 2024, arXiv 2404.19124; Arctic's has the same form).

Pure; runs inside the step program. What differs from `speculator.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array

from arctic_jax.models.layers import parameter
from arctic_jax.models.speculator import (
    Speculator,
    SpeculatorConfig,
    SpeculatorNorm,
    State,
    at,
    norm_sources,
    product,
)
from arctic_jax.weights import Rows, Source


class MLPSpeculator(Speculator):
    """A head's state is the GELU of the norm of the projected state plus the scaled embedding."""

    input_key = "emb_dim"
    embedding_names = ("emb",)

    def __init__(self, config: SpeculatorConfig, num_devices: int) -> None:
        super().__init__(config, num_devices)
        inner = config.inner_size
        self.projections = nnx.List([parameter(inner, size) for size in self.projected_sizes])
        self.norms = nnx.List([SpeculatorNorm(inner) for _ in range(self.num_tied)])

    @classmethod
    def config_from_hf(cls, config: Mapping[str, Any]) -> SpeculatorConfig:
        """Read the config of an `ArcticMLPSpeculatorPreTrainedModel`, or of IBM's.

        Raises:
            UnsupportedModelError: see `SpeculatorConfig.from_hf`.
        """
        return SpeculatorConfig.from_hf(config, cls.input_key)

    def advance(self, k: int, state: State, embedded: Array) -> tuple[Array, State]:
        """See `Speculator`."""
        (hidden,) = state
        x = product(hidden, at(self.projections, k)[...]) + self.config.token_scale * embedded
        x = jax.nn.gelu(at(self.norms, k)(x), approximate=False).astype(hidden.dtype)
        return x, (x,)

    def weight_sources(self) -> dict[str, Source]:
        """Say, for each parameter's path, which checkpoint tensors it is read from."""
        sources = super().weight_sources() | norm_sources("norms", "ln", self.num_tied)
        numbered = range(len(self.projections))
        return sources | {f"projections.{i}": Rows(f"proj.{i}.weight") for i in numbered}
