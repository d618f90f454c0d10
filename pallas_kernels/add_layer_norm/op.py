"""Residual addition and LayerNorm: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.add_layer_norm import mosaic_gpu, reference


def add_layer_norm(
    x: Float[Array, "T d"],
    delta: Float[Array, "T d"],
    delta_bias: Float[Array, " d"],
    weight: Float[Array, " d"],
    bias: Float[Array, " d"],
    *,
    epsilon: float,
    implementation: str | None = None,
) -> Float[Array, "T d"]:
    """Normalise `x + delta + delta_bias` by mean and variance of its row, in float32.

    What encoders do after a block, where the normalised sum is the residual stream itself. Each
    token stands by itself: T may be split over devices, d may not.

    Args:
        x: the residual stream.
        delta: what a block adds to it, without
        delta_bias: the bias of its last product: one array less is moved if it is added here.
        weight: one factor a feature.
        bias: added to each feature at the end.
        epsilon: added to the variance.
        implementation: see `dispatch.resolve`.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if x.ndim != 2 or x.shape != delta.shape or weight.shape != x.shape[1:]:
        raise ValueError(f"{x.shape=}, {delta.shape=} and {weight.shape=} do not fit")
    if not delta_bias.shape == bias.shape == weight.shape:
        raise ValueError(f"{delta_bias.shape=}, {bias.shape=} and {weight.shape=} do not fit")
    arguments = x, delta, delta_bias, weight, bias
    reason = mosaic_gpu_unsupported(*arguments)
    chosen = dispatch.resolve("add_layer_norm", implementation, "xla" if reason else "mosaic_gpu")
    if chosen == "xla":
        return reference.add_layer_norm(*arguments, epsilon)
    if reason:
        raise ValueError(f"add_layer_norm: implementation={chosen!r} cannot do this: {reason}")
    return mosaic_gpu.add_layer_norm(*arguments, epsilon, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(x: Array, *others: Array, **_: object) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `add_layer_norm`, or `None`.

    Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(x, *others)
