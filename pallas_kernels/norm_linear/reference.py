"""Norm and matrix product in plain jnp: the specification, and the implementation `"xla"`."""

from jax import Array

from arctic_jax.pallas_kernels.add_rms_norm.reference import add_rms_norm
from arctic_jax.pallas_kernels.linear.reference import linear


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
    x, normed = add_rms_norm(x, delta, norm_weight, epsilon)
    return x, linear(normed, weight, bias, gated)
