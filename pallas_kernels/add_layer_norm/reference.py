"""Residual addition and LayerNorm in plain jnp: the specification, and what `"xla"` means."""

import jax.numpy as jnp
from jax import Array, lax


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """LayerNorm (Ba et al. 2016) of `x [..., d]`; computed in float32, and left there."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred * lax.rsqrt(variance + epsilon) * weight + bias


def add_layer_norm(
    x: Array, delta: Array, delta_bias: Array, weight: Array, bias: Array, epsilon: float
) -> Array:
    """See `op.add_layer_norm`."""
    total = x.astype(jnp.float32) + delta.astype(jnp.float32) + delta_bias.astype(jnp.float32)
    normed = layer_norm(total, weight, bias, epsilon).astype(x.dtype)
    # Every layer adds to the norm of the one before. On CPUs, XLA would compute all of them anew
    # in each fusion that reads one: six layers deep, one of 79 arrays.
    return lax.optimization_barrier(normed)
