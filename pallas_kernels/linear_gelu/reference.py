"""GELU of a product in plain jnp: the specification, and the implementation `"xla"`."""

from jax import Array

from arctic_jax.pallas_kernels.gelu import gelu


def linear_gelu(x: Array, weight: Array, bias: Array) -> Array:
    """See `op.linear_gelu`."""
    return gelu(x @ weight + bias)
