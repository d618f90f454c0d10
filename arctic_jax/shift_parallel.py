"""Mesh layouts: how tokens, heads and weights are split over the devices of one engine.

Vocabulary; the verbs are pure and run inside the step program, under `jax.shard_map` over one mesh
with the axes `("tp", "sp")`. Models call the verbs and never name an axis, so one model file serves
every layout. Device `(t, s)` owns head block `t * SP + s` of the cache in both layouts: after an
all-to-all over `sp` the order of heads is the order of the tuple `("tp", "sp")` (Ulysses sequence
parallelism: Jacobs et al. 2023; shift parallelism: Hidayetoglu et al. 2025).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from arctic_jax.pallas_kernels.all_reduce import all_reduce

Axes = tuple[str, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inboxes"],
    meta_fields=["name", "tokens", "weights", "devices"],
)
@dataclass(frozen=True)
class MeshLayout:
    """One way to run a step over the mesh. Axes of size one are left out of the tuples.

    Attributes:
        name: for logs and program keys.
        tokens: axes over which the tokens of a step are split between attentions.
        weights: axes over which heads, the feed-forward dimension and experts are split.
        devices: all axes: the vocabulary and the cache's heads are always split over these.
        inboxes: within a step program, where the devices can write to each other, this device's
            row of `Inboxes.addresses`.
    """

    name: str
    tokens: Axes
    weights: Axes
    devices: Axes
    inboxes: Array | None = None

    def partition(self, axis: str | None) -> PartitionSpec:
        """Where the first dimension of a parameter with this logical axis lies.

        Args:
            axis: `"heads"`, `"ffn"`, `"experts"` (split over `weights`), `"vocab"`, `"narrow"`
                (whatever it is, in the narrow part; split over all devices) or `None` (replicated).
        """
        axes = {
            "heads": self.weights,
            "ffn": self.weights,
            "experts": self.weights,
            "vocab": self.devices,
            "narrow": self.devices,
            None: (),
        }[axis]
        return PartitionSpec(axes) if axes else PartitionSpec()

    @property
    def narrow(self) -> MeshLayout:
        """What follows where the batch has narrowed: rows on every device, heads split over all."""
        return replace(self, tokens=(), weights=self.devices)

    def to_heads(self, x: Array) -> Array:
        """`[tokens/SP, groups/TP, w]` to `[tokens, groups/(TP·SP), w]`: one all-to-all."""
        if not self.tokens:
            return x
        # Told to split dimension 1 and to join along 0, XLA for GPUs would transpose twice.
        tokens, _, width = x.shape
        parts = x.reshape(tokens, lax.axis_size(self.tokens), -1, width).swapaxes(0, 1)
        return lax.all_to_all(parts, self.tokens, 0, 0).reshape(-1, *parts.shape[2:])

    def to_tokens(self, x: Array) -> Array:
        """`[tokens, groups/(TP·SP), w]` back to `[tokens/SP, groups/TP, w]`: one all-to-all."""
        return lax.all_to_all(x, self.tokens, 0, 1, tiled=True) if self.tokens else x

    def reduce(self, x: Array) -> Array:
        """Sum the partial results of a product whose contracted dimension is split."""
        return self._sum(x, self.weights)

    def scatter_tokens(self, x: Array) -> Array:
        """Sum `[tokens, d]` over all devices and keep this device's tokens: after the embedding."""
        rest = tuple(axis for axis in self.devices if axis not in self.tokens)
        x = self._sum(x, rest)
        if self.tokens:
            x = lax.psum_scatter(x, self.tokens, scatter_dimension=0, tiled=True)
        return x

    def gather_tokens(self, x: Array) -> Array:
        """`[tokens/SP, d]` to `[tokens, d]`: once, where the batch narrows."""
        return lax.all_gather(x, self.tokens, axis=0, tiled=True) if self.tokens else x

    def gather_vocab(self, logits: Array) -> Array:
        """`[rows, vocab/(TP·SP)]` to `[rows, vocab]`."""
        return lax.all_gather(logits, self.devices, axis=1, tiled=True) if self.devices else logits

    def argmax_vocab(self, logits: Array) -> Array:
        """`[rows, vocab/(TP·SP)]` float32 to the index of each row's first maximum, `[rows]`.

        Each device sends the best of its own entries: two words a row, in one all-gather.
        """
        local = jnp.argmax(logits, axis=1).astype(jnp.int32)
        if not self.devices:
            return local
        index = local + self.vocab_shard() * logits.shape[1]
        best = lax.bitcast_convert_type(jnp.max(logits, axis=1), jnp.int32)
        both = lax.all_gather(jnp.stack([best, index]), self.devices)
        values = lax.bitcast_convert_type(both[:, 0], jnp.float32)
        first = jnp.argmax(values, axis=0)  # devices are in the order of the vocabulary
        return jnp.take_along_axis(both[:, 1], first[None], axis=0)[0]

    def vocab_shard(self) -> Array | int:
        """Index of this device's part of the vocabulary."""
        return lax.axis_index(self.devices) if self.devices else 0

    def expert_shard(self) -> Array | int:
        """Index of this device's part of the experts."""
        return lax.axis_index(self.weights) if self.weights else 0

    def _sum(self, x: Array, axes: Axes) -> Array:
        inboxes = self.inboxes if axes == self.devices else None
        return all_reduce(x, axes, inboxes) if axes else x


def make_mesh(tp: int, sp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh `("tp", "sp")` over the first `tp * sp` devices, in row-major order.

    Raises:
        ValueError: there are fewer devices; the message holds the numbers.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < tp * sp:
        raise ValueError(
            f"tensor_parallel_size={tp} times ulysses_sequence_parallel_size={sp} needs "
            f"{tp * sp} devices, there are {len(devices)}"
        )
    return Mesh(np.asarray(devices[: tp * sp]).reshape(tp, sp), ("tp", "sp"))


def ulysses(tp: int, sp: int) -> MeshLayout:
    """Tokens split over `sp`, heads over `tp`: for many tokens."""
    return MeshLayout("ulysses", _real(sp=sp), _real(tp=tp), _real(tp=tp, sp=sp))


def shift(tp: int, sp: int) -> MeshLayout:
    """Heads split over all devices, tokens on each: full tensor parallelism, for few tokens."""
    return MeshLayout("shift", (), _real(tp=tp, sp=sp), _real(tp=tp, sp=sp))


ALONE = MeshLayout("alone", (), (), ())
"""Every device computes everything: for one device, and for what is too small to be split."""


def _real(**sizes: int) -> Axes:
    return tuple(axis for axis, size in sizes.items() if size > 1)
