"""Product with a weight in plain jnp: the specification, and the implementation `"xla"`."""

import jax
import jax.numpy as jnp
from jax import Array


def linear(
    x: Array, weight: Array, bias: Array | None, gated: bool = False, inputs_first: bool = False
) -> Array:
    """See `op.linear`.

    As one matrix product: with more than two dimensions XLA would transpose the weight first.
    """
    if inputs_first:
        product = x @ weight
    else:
        product = jnp.einsum("tk,ok->to", x, weight.reshape(-1, x.shape[1]))
    if bias is not None:
        product = product + bias.reshape(-1)
    if gated:
        product = product.reshape(len(x), *weight.shape[:-1])
        product = jax.nn.silu(product[:, :, 0]) * product[:, :, 1]
    return product.reshape(len(x), -1)
