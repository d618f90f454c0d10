"""Product with a weight: the public function, its argument checks and its dispatch."""

import math

from jax import Array
from jaxtyping import Float

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.linear import mosaic_gpu, mosaic_gpu_one_token, reference


def linear(
    x: Float[Array, "T K"],
    weight: Float[Array, "... K"],
    bias: Float[Array, "..."] | None = None,
    *,
    gated: bool = False,
    inputs_first: bool = False,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """Multiply tokens by a weight.

    Gated, the weight is `[shards, 2, F, K]`, a gate and an up projection each, and the result is
    `silu(gate) * up` (SwiGLU: Shazeer 2020). The result has the dtype of `x`; `"mosaic_gpu"` keeps
    float32 up to there, `"xla"` rounds before the bias and the gate. T or any dimension of the
    weight but K (and the 2) may be split over devices.

    Args:
        x: the tokens.
        weight: one row an output.
        bias: added to the product, in the shape of the weight without K.
        gated: whether the weight is a SwiGLU pair.
        inputs_first: the weight is `[K, N]`, one row an input.
        implementation: see `dispatch.resolve`.

    Returns:
        The product with its N outputs in the order of the weight's.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    size, outputs = weight.shape[-1], weight.shape[:-1]
    if inputs_first:
        if weight.ndim != 2 or gated:
            raise ValueError(f"inputs_first takes [K, N] without a gate: {weight.shape=}, {gated=}")
        size, outputs = weight.shape[0], weight.shape[1:]
    if x.ndim != 2 or x.shape[1] != size:
        raise ValueError(f"{x.shape=} does not fit {weight.shape=}, {inputs_first=}")
    if bias is not None and bias.shape != outputs:
        raise ValueError(f"{bias.shape=} does not fit {weight.shape=}, {inputs_first=}")
    if gated and (weight.ndim != 4 or weight.shape[1] != 2):
        raise ValueError(f"{weight.shape=} is not [shards, 2, F, K]")
    arguments = x, weight, bias, gated, inputs_first
    reason = mosaic_gpu_unsupported(*arguments)
    one = _takes_one_token(x, weight, bias, inputs_first)
    faster = one_measured_faster(weight) if one else measured_faster(x, weight, gated)
    preferred = "mosaic_gpu" if faster and not reason else "xla"
    chosen = dispatch.resolve("linear", implementation, preferred)
    if chosen == "xla":
        return reference.linear(*arguments)
    if reason:
        raise ValueError(f"linear: implementation='mosaic_gpu' cannot do this: {reason}")
    if one:
        return mosaic_gpu_one_token.linear_of_one(x, weight, interpret=dispatch.interpreter())
    return mosaic_gpu.linear(*arguments, interpret=dispatch.interpreter())


def measured_faster(x: Array, weight: Array, gated: bool) -> bool:
    """Return whether `"mosaic_gpu"` was measured faster for such sizes on an H200.

    It was in the products of Llama-3.1-8B, whole and in two and four parts, and of Qwen3-0.6B with
    16 to 128 tokens (up to 18 % less time), but not in a SwiGLU pair with 128, nor in the smallest
    of them; with 8 tokens it was as fast. Nothing else has been measured.
    """
    nbytes = math.prod(weight.shape) * weight.dtype.itemsize
    return 8 < x.shape[0] <= (64 if gated else 128) and nbytes >= 6 * 2**20


def one_measured_faster(weight: Array) -> bool:
    """Return whether one token times `weight [K, N]` was measured faster by `"mosaic_gpu"`.

    It was up to 2^23 numbers, of which XLA writes all products to memory before it adds them up
    (1.6 to 4 times as fast); with more, XLA does that in one kernel, and is faster.
    """
    return math.prod(weight.shape) <= 2**23


def mosaic_gpu_unsupported(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    gated: bool = False,
    inputs_first: bool = False,
    **_: object,
) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `linear`, or `None`.

    Only shapes and dtypes are looked at.
    """
    if _takes_one_token(x, weight, bias, inputs_first):
        return None
    return mosaic_gpu.unsupported(x, weight, bias, gated, inputs_first)


def _takes_one_token(x: Array, weight: Array, bias: Array | None, inputs_first: bool) -> bool:
    return inputs_first and bias is None and mosaic_gpu_one_token.takes(x, weight)
