"""Norm and matrix product in plain jnp: the specification, and the implementation `"xla"`."""

import jax
import jax.numpy as jnp
from jax import Array

from arctic_jax.pallas_kernels.add_rms_norm import reference


def linear(x: Array, weight: Array, bias: Array | None, gated: bool) -> Array:
    """`x [T, K]` times `weight [..., K]`, plus the bias, to `[T, N]`; gated, see `norm_linear`.

    As one matrix product: with more than two dimensions XLA would transpose the weight first.
    """
    tokens, size = x.shape
    product = jnp.einsum("tk,ok->to", x, weight.reshape(-1, size))
    if bias is not None:
        product = product + bias.reshape(-1)
    if gated:
        product = product.reshape(tokens, *weight.shape[:-1])
        product = jax.nn.silu(product[:, :, 0]) * product[:, :, 1]
    return product.reshape(tokens, -1)


def norm_linear(
    x: Array,
    delta: Array,
    norm_weight: Array,
    weight: Array,
    bias: Array | None,
    epsilon: float,
    gated: bool,
) -> tuple[Array, Array]:
    """See `op.norm_linear`."""
    x, normed = reference.add_rms_norm(x, delta, norm_weight, epsilon)
    return x, linear(normed, weight, bias, gated)
