"""Key/value cache update in plain jnp: the specification, and the implementation `"xla"`."""

import jax.numpy as jnp
from jax import Array, lax


def kv_cache_update(
    qkv: Array,
    cos: Array,
    sin: Array,
    k_cache: Array,
    v_cache: Array,
    layer: Array,
    slot_mapping: Array,
    q_norm: Array | None,
    k_norm: Array | None,
    epsilon: float,
) -> tuple[Array, Array, Array]:
    """See `op.kv_cache_update`."""
    T, _, L, rows, D = qkv.shape
    _, blocks, _, block_size, _ = k_cache.shape
    q, k, v = jnp.split(qkv, [rows - 2, rows - 1], axis=3)
    q = _rotate(_normalize(q, q_norm, epsilon), cos, sin).astype(qkv.dtype)
    k = _rotate(_normalize(k, k_norm, epsilon), cos, sin).astype(k_cache.dtype)
    v = jnp.where(jnp.isfinite(v), v, 0).astype(v_cache.dtype)
    # A negative index would wrap around; one past the end is dropped.
    block = jnp.where(slot_mapping < 0, blocks, slot_mapping // block_size)
    offset = slot_mapping % block_size
    if T == 1:
        # Twice, so that it is a scatter: XLA fuses an update of one place into the attention that
        # reads it, and then copies the whole cache.
        k, v, block, offset = (jnp.repeat(x, 2, axis=0) for x in (k, v, block, offset))

    def write(cache: Array, new: Array) -> Array:
        for i in range(L):
            cache = cache.at[layer + i, block, :, offset].set(new[:, :, i, 0], mode="drop")
        return cache

    return q.reshape(T, -1, D), write(k_cache, k), write(v_cache, v)


def _normalize(x: Array, weight: Array | None, epsilon: float) -> Array:
    """`x [T, G, L, rows, D]` in float32, with an RMS norm if its `weight [L, D]` is given."""
    x = x.astype(jnp.float32)
    if weight is None:
        return x
    scale = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * scale * weight.astype(jnp.float32)[None, None, :, None]


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of float32 `x [T, G, L, rows, D]` in the half-split order."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (angle[:, None, None, None] for angle in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
