"""Gated linear unit: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.gated_linear_unit import mosaic_gpu, reference


def gated_linear_unit(
    x: Float[Array, "T K"],
    weight: Float[Array, "shards 2 F K"],
    bias: Float[Array, "shards 2 F"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "T shards*F"]:
    """SwiGLU (Shazeer 2020): `silu(x @ gate.T) * (x @ up.T)`, shard by shard.

    T, the shards or F may be split over devices, K may not.

    Args:
        x: tokens.
        weight: gate and up of each shard, as `models.layers.GatedMLP` stores them.
        bias: added to the two products.
        implementation: see `dispatch.resolve`.

    Returns:
        The gated products, shards side by side.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if weight.ndim != 4 or weight.shape[1] != 2 or x.shape[1:] != weight.shape[3:]:
        raise ValueError(f"{x.shape=} and {weight.shape=} do not fit")
    if bias is not None and bias.shape != weight.shape[:3]:
        raise ValueError(f"{bias.shape=} does not fit {weight.shape=}")
    reason = mosaic_gpu_unsupported(x, weight, bias)
    # Below, XLA's fusion of the gate costs less than what its matrix product is ahead.
    preferred = "xla" if reason or x.shape[0] < 1 << 30 else "mosaic_gpu"
    chosen = dispatch.resolve("gated_linear_unit", implementation, preferred)
    if chosen == "xla":
        return reference.gated_linear_unit(x, weight, bias)
    if reason:
        raise ValueError(f"gated_linear_unit: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.gated_linear_unit(x, weight, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(x: Array, weight: Array, bias: Array | None = None) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `gated_linear_unit`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    if bias is not None:
        return "there is a bias"
    return mosaic_gpu.unsupported(x, weight)
