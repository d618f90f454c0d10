"""Residual addition and RMSNorm: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.add_rms_norm import mosaic_gpu, reference


def add_rms_norm(
    x: Float[Array, "T d"],
    delta: Float[Array, "T d"],
    weight: Float[Array, " d"],
    *,
    epsilon: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "T d"], Float[Array, "T d"]]:
    """Add `delta` to the residual stream and normalise the sum by its root mean square.

    The sum is rounded to the dtype of `x`, its mean square is taken in float32, and the normalised
    sum is rounded again before it is multiplied by `weight` (the order of `transformers`). Each
    token stands by itself: T may be split over devices, d may not.

    Args:
        x: the residual stream.
        delta: what a block adds to it.
        weight: one factor a feature.
        epsilon: added to the mean square.
        implementation: see `dispatch.resolve`.

    Returns:
        `x + delta`, and its norm times `weight`.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if x.ndim != 2 or x.shape != delta.shape or weight.shape != x.shape[1:]:
        raise ValueError(f"{x.shape=}, {delta.shape=} and {weight.shape=} do not fit")
    reason = mosaic_gpu_unsupported(x, delta, weight)
    preferred = "xla" if reason or measured_slower(x) else "mosaic_gpu"
    chosen = dispatch.resolve("add_rms_norm", implementation, preferred)
    if chosen == "xla":
        return reference.add_rms_norm(x, delta, weight, epsilon)
    if reason:
        raise ValueError(f"add_rms_norm: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.add_rms_norm(x, delta, weight, epsilon, interpret=dispatch.interpreter())


def measured_slower(x: Array) -> bool:
    """Return whether `"mosaic_gpu"` was measured slower for such sizes on an H200.

    It was for 8,192 tokens of 576 (14 us, XLA 12); of 4,096 it takes four fifths of XLA's time.
    """
    tokens, size = x.shape
    return tokens >= 1024 and size < 1024


def mosaic_gpu_unsupported(x: Array, delta: Array, weight: Array, **_: object) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `add_rms_norm`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(x, delta, weight)
