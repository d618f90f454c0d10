"""Norm and matrix product: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.norm_linear import mosaic_gpu, reference


def norm_linear(
    x: Float[Array, "T K"],
    delta: Float[Array, "T K"],
    norm_weight: Float[Array, " K"],
    weight: Float[Array, "... K"],
    bias: Float[Array, "..."] | None = None,
    *,
    epsilon: float,
    gated: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "T K"], Float[Array, "T N"]]:
    """Add `delta` to the residual stream and multiply the RMSNorm of the sum by `weight`.

    Sum and norm as in `add_rms_norm`. Gated, the weight is `[shards, 2, F, K]`, a gate and an up
    projection each, and the result is `silu(gate) * up` (SwiGLU: Shazeer 2020). T or any dimension
    of the weight but K (and the 2) may be split over devices.

    Args:
        x: the residual stream.
        delta: what the block before adds to it.
        norm_weight: of the norm.
        weight: one row an output.
        bias: added to the product, in the shape of the weight without K.
        epsilon: added to the mean square.
        gated: whether the weight is a SwiGLU pair.
        implementation: see `dispatch.resolve`.

    Returns:
        `x + delta`, and the product with its N outputs in the order of the weight's rows.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if x.ndim != 2 or x.shape != delta.shape or norm_weight.shape != x.shape[1:]:
        raise ValueError(f"{x.shape=}, {delta.shape=} and {norm_weight.shape=} do not fit")
    if weight.shape[-1] != x.shape[1] or (bias is not None and bias.shape != weight.shape[:-1]):
        raise ValueError(f"{weight.shape=} with {bias=} does not fit {x.shape=}")
    if gated and (weight.ndim != 4 or weight.shape[1] != 2):
        raise ValueError(f"{weight.shape=} is not [shards, 2, F, K]")
    arguments = x, delta, norm_weight, weight, bias
    reason = mosaic_gpu_unsupported(*arguments)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("norm_linear", implementation, preferred)
    if chosen == "xla":
        return reference.norm_linear(*arguments, epsilon, gated)
    if reason:
        raise ValueError(f"norm_linear: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.norm_linear(*arguments, epsilon, gated, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(
    x: Array,
    delta: Array,
    norm_weight: Array,
    weight: Array,
    bias: Array | None = None,
    **_: object,
) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `norm_linear`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(x, delta, norm_weight, weight)
