"""The paged key/value cache on the devices. Vocabulary; a pytree, donated to every step.

A layer's keys and values are `[blocks, kv_heads, block_size, head_dim]`: one contiguous
`[block_size, head_dim]` tile a block and head, as the tensor memory accelerator reads it. Token
`i` of a sequence lies in slot `block_table[i // block_size] * block_size + i % block_size`.
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
    """Keys and values, one array a layer."""

    k: tuple[Array, ...]
    v: tuple[Array, ...]

    def moved(self, slots: Array) -> KVCache:
        """Copy tokens from slot to slot, `slots [2, N]`, all read before any is written.

        -1 as the slot to write stands for no copy.
        """
        block_size = self.k[0].shape[2]
        source, target = slots
        target = jnp.where(target < 0, self.k[0].shape[0] * block_size, target)  # is dropped

        def move(layer: Array) -> Array:
            tokens = layer[source // block_size, :, source % block_size]
            places = layer.at[target // block_size, :, target % block_size]
            return places.set(tokens, mode="drop")

        return KVCache(k=tuple(map(move, self.k)), v=tuple(map(move, self.v)))

    def split(self, num_layers: int) -> tuple[KVCache, KVCache]:
        """Return the first layers, and the others."""
        first, rest = slice(num_layers), slice(num_layers, None)
        return KVCache(self.k[first], self.v[first]), KVCache(self.k[rest], self.v[rest])

    def __add__(self, other: KVCache) -> KVCache:
        """Return the layers of both."""
        return KVCache(self.k + other.k, self.v + other.v)


@dataclass(frozen=True)
class LayerCacheSpec:
    """Shape of a layer's cache.

    Attributes:
        num_kv_heads: with the copies made where heads are fewer than devices.
        head_dim: of a key.
        partition: how `[blocks, kv_heads, block_size, head_dim]` lies on the mesh.
    """

    num_kv_heads: int
    head_dim: int
    partition: PartitionSpec


@dataclass(frozen=True)
class KVCacheSpec:
    """Shape of a cache."""

    layers: tuple[LayerCacheSpec, ...]
    block_size: int
    dtype: jnp.dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values, each head counted once."""
        numbers = sum(layer.num_kv_heads * layer.head_dim for layer in self.layers)
        return 2 * numbers * self.block_size * jnp.dtype(self.dtype).itemsize

    def bytes_per_device(self, mesh: Mesh) -> int:
        """Bytes that a block takes on each device."""
        numbers = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(self.shapes(1, mesh))
        )
        return numbers * jnp.dtype(self.dtype).itemsize

    @property
    def partitions(self) -> KVCache:
        """How it lies on the mesh, a `PartitionSpec` in the place of each array."""
        found: Any = tuple(layer.partition for layer in self.layers)
        return KVCache(found, found)

    def shapes(self, num_blocks: int, mesh: Mesh) -> KVCache:
        """Return a cache of `num_blocks` blocks on `mesh` without its contents."""
        layers: Any = tuple(
            jax.ShapeDtypeStruct(
                (num_blocks, layer.num_kv_heads, self.block_size, layer.head_dim),
                self.dtype,
                sharding=NamedSharding(mesh, layer.partition),
            )
            for layer in self.layers
        )
        return KVCache(layers, layers)

    def allocate(self, num_blocks: int, mesh: Mesh) -> KVCache:
        """Make a zeroed cache of `num_blocks` blocks on `mesh`."""
        return jax.tree.map(_zeros, self.shapes(num_blocks, mesh))


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)
