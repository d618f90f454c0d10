"""A bias and GELU: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.bias_gelu import mosaic_gpu, reference

PREFERRED = "xla"
"""The kernel has not been measured."""


def bias_gelu(
    x: Float[Array, "T d"], bias: Float[Array, " d"], *, implementation: str | None = None
) -> Float[Array, "T d"]:
    """Return `x + bias` times the normal distribution's share below it, element by element.

    What encoders do between the two products of a block. T and d may be split over devices.

    Args:
        x: a product. Of 16-bit floats GELU is a polynomial, whose error of up to 6e-5 is lost in
            their rounding.
        bias: one number a column.
        implementation: see `dispatch.resolve`.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if x.ndim != 2 or bias.shape != x.shape[1:]:
        raise ValueError(f"{x.shape=} and {bias.shape=} do not fit")
    reason = mosaic_gpu_unsupported(x, bias)
    chosen = dispatch.resolve("bias_gelu", implementation, "xla" if reason else PREFERRED)
    if chosen == "xla":
        return reference.bias_gelu(x, bias)
    if reason:
        raise ValueError(f"bias_gelu: implementation={chosen!r} cannot do this: {reason}")
    return mosaic_gpu.bias_gelu(x, bias, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(x: Array, bias: Array, **_: object) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `bias_gelu`, or `None`.

    Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(x, bias)
