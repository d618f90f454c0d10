"""The paged key/value cache on the devices. Vocabulary; a pytree, donated to every step.

A layer's keys and values are `[blocks, kv_heads, block_size, head_dim]`: one contiguous
`[block_size, head_dim]` tile a block and head, as the tensor memory accelerator reads it. Token
`i` of a sequence lies in slot `block_table[i // block_size] * block_size + i % block_size`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

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


@dataclass(frozen=True)
class KVCacheSpec:
    """Shape of the cache; `num_kv_heads` counts the copies made where heads are fewer than devices.

    Attributes:
        partition: how `[blocks, kv_heads, block_size, head_dim]` lies on the mesh.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: jnp.dtype
    partition: PartitionSpec

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, keys and values, all devices."""
        elements = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return elements * jnp.dtype(self.dtype).itemsize

    def allocate(self, num_blocks: int, mesh: Mesh) -> KVCache:
        """Make a zeroed cache of `num_blocks` blocks on `mesh`."""
        shape = (num_blocks, self.num_kv_heads, self.block_size, self.head_dim)
        sharding = NamedSharding(mesh, self.partition)
        zeros = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=sharding)
        layers = range(self.num_layers)
        return KVCache(k=tuple(zeros() for _ in layers), v=tuple(zeros() for _ in layers))
