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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids"], meta_fields=[])
@dataclass(frozen=True)
class TokenCache:
    """Which token lies in each slot, `ids [blocks, block_size]` int32: what was read and said."""

    ids: Array

    def written(self, slot_mapping: Array, token_ids: Array) -> TokenCache:
        """Put tokens `[T]` into their slots; -1 for no slot."""
        num_blocks, size = self.ids.shape
        block = jnp.where(slot_mapping < 0, num_blocks, slot_mapping // size)  # is dropped
        index = jnp.stack([block, slot_mapping % size])
        if len(token_ids) == 1:  # twice, or else XLA copies all, see `kv_cache_update.reference`
            index, token_ids = jnp.repeat(index, 2, axis=1), jnp.repeat(token_ids, 2)
        return TokenCache(self.ids.at[*index].set(token_ids, mode="drop"))

    def moved(self, slots: Array) -> TokenCache:
        """See `KVCache`."""
        source, target = slots
        size = self.ids.shape[1]
        return self.written(target, self.ids[source // size, source % size])


KVCaches = tuple[Any, ...]
"""The model's `KVCache` and, if it has any, the drafter's. They have the same blocks."""


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

    def shape(self, num_blocks: int, block_size: int, dtype: jnp.dtype, mesh: Mesh) -> KVCache:
        """Return the cache without its contents."""
        shape = (self.num_layers, num_blocks, self.num_kv_heads, block_size, self.head_dim)
        sharding = NamedSharding(mesh, self.partition)
        array: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return KVCache(array, array)

    @property
    def lies(self) -> KVCache:
        """Its partition in the place of each array."""
        partition: Any = self.partition
        return KVCache(partition, partition)

    def bytes_per_token(self, dtype: jnp.dtype) -> int:
        """Bytes over all layers, keys and values, each head counted once."""
        numbers = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return numbers * jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class TokenCacheSpec:
    """A `TokenCache`, on every device."""

    def shape(self, num_blocks: int, block_size: int, dtype: jnp.dtype, mesh: Mesh) -> TokenCache:
        """See `ModelCacheSpec`."""
        del dtype
        sharding = NamedSharding(mesh, PartitionSpec())
        ids: Any = jax.ShapeDtypeStruct((num_blocks, block_size), jnp.int32, sharding=sharding)
        return TokenCache(ids)

    @property
    def lies(self) -> TokenCache:
        """See `ModelCacheSpec`."""
        partition: Any = PartitionSpec()
        return TokenCache(partition)

    def bytes_per_token(self, dtype: jnp.dtype) -> int:
        """See `ModelCacheSpec`."""
        del dtype
        return 4


@dataclass(frozen=True)
class KVCacheSpec:
    """Shapes of all caches of an engine."""

    models: tuple[ModelCacheSpec | TokenCacheSpec, ...]
    block_size: int
    dtype: jnp.dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all caches, each head counted once."""
        return self.block_size * sum(m.bytes_per_token(self.dtype) for m in self.models)

    def bytes_per_device(self, mesh: Mesh) -> int:
        """Bytes that a block takes on each device."""
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.shapes(1, mesh))
        )

    @property
    def partitions(self) -> KVCaches:
        """How they lie on the mesh, a `PartitionSpec` in the place of each array."""
        return tuple(model.lies for model in self.models)

    def shapes(self, num_blocks: int, mesh: Mesh) -> KVCaches:
        """Return caches of `num_blocks` blocks on `mesh` without their contents."""
        return tuple(m.shape(num_blocks, self.block_size, self.dtype, mesh) for m in self.models)

    def allocate(self, num_blocks: int, mesh: Mesh) -> KVCaches:
        """Make zeroed caches of `num_blocks` blocks on `mesh`."""
        return jax.tree.map(_zeros, self.shapes(num_blocks, mesh))


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)
