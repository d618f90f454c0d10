"""Key/value cache update in plain jnp: the specification, and the implementation `"xla"`."""

import jax.numpy as jnp
from jax import Array, lax


def kv_cache_update(
    qkv: Array,
    cos: Array,
    sin: Array,
    k_caches: tuple[Array, ...],
    v_caches: tuple[Array, ...],
    slot_mapping: Array,
    q_norm: Array | None,
    k_norm: Array | None,
    epsilon: float,
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """See `op.kv_cache_update`."""
    T, _, _, rows, D = qkv.shape
    blocks, _, block_size, _ = k_caches[0].shape
    q, k, v = jnp.split(qkv, [rows - 2, rows - 1], axis=3)
    q = _rotate(_normalize(q, q_norm, epsilon), cos, sin).astype(qkv.dtype)
    k = _rotate(_normalize(k, k_norm, epsilon), cos, sin).astype(k_caches[0].dtype)
    v = jnp.where(jnp.isfinite(v), v, 0).astype(v_caches[0].dtype)
    # A negative index would wrap around; one past the end is dropped.
    block = jnp.where(slot_mapping < 0, blocks, slot_mapping // block_size)
    offset = slot_mapping % block_size

    def write(caches: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
        return tuple(
            cache.at[block, :, offset].set(new[:, :, layer, 0], mode="drop")
            for layer, cache in enumerate(caches)
        )

    return q.reshape(T, -1, D), write(k_caches, k), write(v_caches, v)


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
