"""Gated linear unit in plain jnp: the specification, and the implementation `"xla"`."""

import jax
import jax.numpy as jnp
from jax import Array


def gated_linear_unit(x: Array, weight: Array, bias: Array | None) -> Array:
    """See `op.gated_linear_unit`."""
    T, K = x.shape
    # As one matrix product: with more than two dimensions XLA would transpose the weight first.
    product = jnp.einsum("tk,ok->to", x, weight.reshape(-1, K))
    product = product.reshape(T, *weight.shape[:-1])
    if bias is not None:
        product = product + bias
    return (jax.nn.silu(product[:, :, 0]) * product[:, :, 1]).reshape(T, -1)
