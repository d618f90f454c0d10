"""Key/value cache update in plain jnp: the specification, and the implementation `"xla"`."""

import jax.numpy as jnp
from jax import Array


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of `x [T, heads, D]` in the half-split order; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def kv_cache_update(
    k: Array,
    v: Array,
    cos: Array,
    sin: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
) -> tuple[Array, Array]:
    """See `op.kv_cache_update`."""
    blocks, _, block_size, _ = k_cache.shape
    # A negative index would wrap around; one past the end is dropped.
    block = jnp.where(slot_mapping < 0, blocks, slot_mapping // block_size)
    offset = slot_mapping % block_size
    k = rotate(k, cos, sin).astype(k_cache.dtype)
    k_cache = k_cache.at[block, :, offset].set(k, mode="drop")
    v_cache = v_cache.at[block, :, offset].set(v.astype(v_cache.dtype), mode="drop")
    return k_cache, v_cache
