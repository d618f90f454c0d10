"""The paged key/value cache on the devices. Vocabulary; a pytree, donated to every step.

A model's keys and values are `[layers, blocks, kv_heads, block_size, head_dim]`: one contiguous
`[block_size, head_dim]` tile a layer, block and head, as the tensor memory accelerator reads it.
Token `i` of a sequence lies in slot `block_table[i // block_size] * block_size + i % block_size` of
every layer. All layers are one array, because each argument and each result of a program costs host
time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers of a model."""

    k: Array
    v: Array

    def moved(self, slots: Array) -> KVCache:
        """Copy tokens from slot to slot, `slots [2, N]`, all read before any is written.

        -1 as the slot to write stands for no copy.
        """
        _, num_blocks, _, block_size, _ = self.k.shape
        source, target = slots
        target = jnp.where(target < 0, num_blocks * block_size, target)  # is dropped

        def move(cache: Array) -> Array:
            tokens = cache[:, source // block_size, :, source % block_size]
            places = cache.at[:, target // block_size, :, target % block_size]
            return places.set(tokens, mode="drop")

        return jax.tree.map(move, self)


KVCaches = tuple[KVCache, ...]
"""The model's cache and, if it has one, the drafter's. They have the same blocks."""


@dataclass(frozen=True)
class ModelCacheSpec:
    """Shape of a model's cache.

    Attributes:
        num_layers: that own keys and values.
        num_kv_heads: with the copies made where heads are fewer than devices.
        head_dim: of a key.
        partition: how `[layers, blocks, kv_heads, block_size, head_dim]` lies on the mesh.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    partition: PartitionSpec


@dataclass(frozen=True)
class KVCacheSpec:
    """Shapes of all caches of an engine."""

    models: tuple[ModelCacheSpec, ...]
    block_size: int
    dtype: jnp.dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values, each head counted once."""
        numbers = sum(m.num_layers * m.num_kv_heads * m.head_dim for m in self.models)
        return 2 * numbers * self.block_size * jnp.dtype(self.dtype).itemsize

    def bytes_per_device(self, mesh: Mesh) -> int:
        """Bytes that a block takes on each device."""
        numbers = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(self.shapes(1, mesh))
        )
        return numbers * jnp.dtype(self.dtype).itemsize

    @property
    def partitions(self) -> KVCaches:
        """How they lie on the mesh, a `PartitionSpec` in the place of each array."""
        found: Any = tuple(KVCache(model.partition, model.partition) for model in self.models)  # pyright: ignore
        return found

    def shapes(self, num_blocks: int, mesh: Mesh) -> KVCaches:
        """Return caches of `num_blocks` blocks on `mesh` without their contents."""
        found = []
        for model in self.models:
            shape = (model.num_layers, num_blocks, model.num_kv_heads, self.block_size)
            array: Any = jax.ShapeDtypeStruct(
                (*shape, model.head_dim),
                self.dtype,
                sharding=NamedSharding(mesh, model.partition),
            )
            found.append(KVCache(array, array))
        return tuple(found)

    def allocate(self, num_blocks: int, mesh: Mesh) -> KVCaches:
        """Make zeroed caches of `num_blocks` blocks on `mesh`."""
        return jax.tree.map(_zeros, self.shapes(num_blocks, mesh))


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)
