"""Mixture of experts: each token goes through a few of many feed-forwards. Pure.

Runs inside the step program. No expert has a capacity: a token's output depends on that token
alone, whatever the other rows of the step hold, padding included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from arctic_jax.config import MoEConfig
from arctic_jax.models.layers import RMSNorm, parameter
from arctic_jax.pallas_kernels.ragged_dot import ragged_dot
from arctic_jax.shift_parallel import MeshLayout

MOST_UNSORTED = 32
"""Rows, one for each token and expert, that are not sorted: most have an expert of their own."""


class MoE(nnx.Module):
    """SwiGLU experts, of which a softmax router takes the k best for each token.

    Top-k gating: Shazeer et al. 2017; without shared experts and capacity: Qwen3, Yang et al. 2025.
    A device holds whole experts (docs/decisions/0013), `gate_up [experts, 2 * ffn, hidden]` and
    `down [experts, hidden, ffn]`, and sums with the others what its own give to the tokens.

    Args:
        hidden_size: of the residual stream.
        config: the experts' numbers.
        num_devices: P, the devices of one engine.
        implementation: of every operation, see `pallas_kernels.dispatch`.

    Raises:
        ValueError: the experts cannot be split over P devices; the message holds the numbers.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        num_devices: int,
        implementation: str | None = None,
    ) -> None:
        if config.num_experts % num_devices:
            raise ValueError(
                f"num_experts {config.num_experts} cannot be split over {num_devices} devices"
            )
        experts, size = config.num_experts, config.intermediate_size
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.most_unsorted = min(MOST_UNSORTED, experts)
        self.implementation = implementation
        self.router = parameter(experts, hidden_size)
        self.gate_up = parameter(experts, 2 * size, hidden_size, axis="experts")
        self.down = parameter(experts, hidden_size, size, axis="experts")

    def __call__(
        self, x: Array, delta: Array, norm: RMSNorm, layout: MeshLayout
    ) -> tuple[Array, Array]:
        """`x` and `delta [T, hidden]` to their sum, and the mixture's output for its norm."""
        x, normed = norm.add(x, delta)
        weights, experts = self.route(normed)
        here = self.gate_up.shape[0]
        experts = experts - layout.expert_shard() * here
        mine = (experts >= 0) & (experts < here)
        if experts.size <= self.most_unsorted:
            rows = jnp.repeat(normed, self.top_k, axis=0)
            rows = self._feed(functools.partial(expert_dot, experts=experts.reshape(-1)), rows)
        else:
            rows = self._feed_sorted(normed, jnp.where(mine, experts, here).reshape(-1))
        out = jnp.where(mine[..., None], rows.reshape(*mine.shape, -1), 0) * weights[..., None]
        return x, layout.reduce(out.sum(axis=1).astype(x.dtype))

    def _feed(self, product: Callable[..., Array], rows: Array) -> Array:
        """Return what the experts that `product` knows of make of the rows."""
        gate, up = jnp.split(product(rows, self.gate_up[...]), 2, axis=1)
        return product(jax.nn.silu(gate) * up, self.down[...])

    def _feed_sorted(self, x: Array, experts: Array) -> Array:
        """Return what `experts [T * k]` make of `x [T, hidden]`, k rows a token.

        One row for each token and expert is sorted by expert. Those of other devices come last,
        belong to no group and so take part in no product.
        """
        order = jnp.argsort(experts)
        here = jnp.arange(self.gate_up.shape[0])
        sizes = jnp.sum(experts[:, None] == here, axis=0, dtype=jnp.int32)
        rows = x[order // self.top_k]
        product = functools.partial(
            ragged_dot, group_sizes=sizes, implementation=self.implementation
        )
        rows = self._feed(product, rows)
        # Back by a gather, not by a scattered sum: its order, and so its rounding, would vary.
        return rows[jnp.argsort(order)]

    def route(self, x: Array) -> tuple[Array, Array]:
        """`x [T, hidden]` to the weights (float32) and indices of its experts, `[T, k]`.

        Among equals the first ones are taken.
        """
        logits = jnp.einsum("td,ed->te", x, self.router[...], preferred_element_type=jnp.float32)
        weights, experts = lax.top_k(jax.nn.softmax(logits), self.top_k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(axis=1, keepdims=True)
        return weights, experts


def expert_dot(rows: Array, weight: Array, experts: Array) -> Array:
    """Multiply each row by the transposed matrix of its expert.

    No kernel of ours: XLA gathers the matrices within the product, and reads each at 0.8 to 0.9 of
    a copy's rate (benchmarks/results/h200/expert_dot.json).

    Args:
        rows: `[M, K]`, in any order.
        weight: `[G, N, K]`.
        experts: `[M]`; one that there is not for a row whose product nobody wants.
    """
    of_row = weight[jnp.clip(experts, 0, len(weight) - 1)]
    product = jnp.einsum("mk,mnk->mn", rows, of_row, preferred_element_type=jnp.float32)
    return product.astype(rows.dtype)
