"""Log-probabilities: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float, Int

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.logprobs import mosaic_gpu, reference


def logprobs(
    logits: Float[Array, "R V"],
    target: Int[Array, " R"],
    wanted: Int[Array, ""],
    *,
    top: int,
    implementation: str | None = None,
) -> tuple[Float[Array, " R"], Int[Array, " R"], Int[Array, "R top"], Float[Array, "R top"]]:
    """Log-probability and rank of each row's target, and the likeliest tokens of each row.

    Args:
        logits: float32 and finite; for other rows the numbers mean nothing.
        target: a token.
        wanted: 0 if nobody wants them: then everything returned is 0.
        top: how many of the likeliest tokens; those past the vocabulary are 0.
        implementation: see `dispatch.resolve`.

    Returns:
        The logarithm of the target's probability, its rank (1 plus the number of larger logits),
        the ids of the likeliest tokens (the first of equals first) and their log-probabilities.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if target.shape != logits.shape[:1] or wanted.shape != () or top < 0:
        raise ValueError(f"{target.shape=}, {wanted.shape=}, {top=} do not fit {logits.shape=}")
    reason = mosaic_gpu_unsupported(logits)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("logprobs", implementation, preferred)
    if chosen == "xla":
        return reference.logprobs(logits, target, wanted, top=top)
    if reason:
        raise ValueError(f"logprobs: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.logprobs(logits, target, wanted, top=top, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(logits: Array, *_: Array, **__: int) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `logprobs`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(logits)
