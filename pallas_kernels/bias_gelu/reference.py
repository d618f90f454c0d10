"""A bias and GELU by the error function (Hendrycks and Gimpel 2016) in plain jnp."""

import jax
import jax.numpy as jnp
from jax import Array

LIMIT = 4.5
"""Beyond it the normal distribution is taken to be 0 or 1; it differs by 4e-6."""
COEFFICIENTS = (
    0.39871057,
    -0.065977271,
    0.009580654,
    -0.0010362534,
    8.1209732e-05,
    -4.4316864e-06,
    1.580258e-07,
    -3.2839147e-09,
    3.0000096e-11,
)
"""Of 1, x², x⁴, ...: times x, the normal distribution less 1/2, fitted so that the largest error of
GELU within the limit is least, 3.5e-5. At the limit it is a little more than 1/2, and cut there."""


def polynomial_gelu(x: Array) -> Array:
    """GELU of float32, for results that are rounded to 16 bits, where its error is lost.

    The error function of a matrix of activations costs a GPU more than moving the matrix does.
    """
    square = jnp.minimum(x * x, LIMIT * LIMIT)
    share = jnp.full_like(square, COEFFICIENTS[-1])
    for coefficient in COEFFICIENTS[-2::-1]:
        share = share * square + coefficient
    share = jnp.minimum(jnp.maximum(x * share, -0.5), 0.5) + 0.5
    return x * share


def bias_gelu(x: Array, bias: Array) -> Array:
    """See `op.bias_gelu`."""
    total = x + bias
    if x.dtype.itemsize > 2:
        return jax.nn.gelu(total, approximate=False)
    return polynomial_gelu(total.astype(jnp.float32)).astype(x.dtype)
