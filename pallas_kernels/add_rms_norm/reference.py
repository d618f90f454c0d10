"""Residual addition and RMSNorm in plain jnp: the specification, and the implementation `"xla"`."""

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """RMSNorm (Zhang and Sennrich 2019) of `x [..., d]`; normalised in float32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale).astype(x.dtype) * weight


def add_rms_norm(x: Array, delta: Array, weight: Array, epsilon: float) -> tuple[Array, Array]:
    """See `op.add_rms_norm`."""
    x = x + delta
    return x, rms_norm(x, weight, epsilon)
