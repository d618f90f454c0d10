"""Sampling: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Bool, Float, Int

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.sampling import mosaic_gpu, reference


def sampling(
    logits: Float[Array, "R V"],
    seen: Int[Array, "N V"],
    bias: Float[Array, "B V"],
    state_row: Int[Array, " R"],
    bias_row: Int[Array, " R"],
    repetition_penalty: Float[Array, " R"],
    frequency_penalty: Float[Array, " R"],
    presence_penalty: Float[Array, " R"],
    temperature: Float[Array, " R"],
    min_p: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    seed: Int[Array, "R 2"],
    step: Int[Array, " R"],
    *,
    implementation: str | None = None,
) -> tuple[Int[Array, " R"], Bool[Array, " R"]]:
    """Draw a token for each row of logits.

    The order is vLLM's: penalties, biases, temperature, min-p, top-k, top-p. Equal logits stay
    together: if one of them is in the set that is drawn from, all are. The draw adds Gumbel noise
    and takes the largest sum (Gumbel-max), with the bits of `jax.random.gumbel` for the key that
    `jax.random.fold_in` makes from `seed` and `step`; so it depends on nothing else in the batch.

    Args:
        logits: float32.
        seen: what penalties look at: for each token, how often the output has it, plus
            `reference.IN_PROMPT` if the prompt has it.
        bias: added to the logits; -inf forbids a token.
        state_row: the row of `seen`; -1 for neither penalties nor biases.
        bias_row: the row of `bias`; not looked at where `state_row` is -1.
        repetition_penalty: divides positive and multiplies other logits of the tokens seen.
        frequency_penalty: subtracted for each occurrence in the output.
        presence_penalty: subtracted from the tokens that the output has.
        temperature: divides the logits; 0 takes the likeliest token, the first of equals.
        min_p: keeps the tokens at least so likely, relative to the likeliest; 0 keeps all.
        top_k: keeps the likeliest `top_k`; 0 or less keeps all.
        top_p: keeps the likeliest tokens whose probabilities sum to it; 1 keeps all.
        seed: the words of a 64-bit seed.
        step: how many tokens the request has drawn.
        implementation: see `dispatch.resolve`.

    Returns:
        The tokens, and whether the logits are finite and some token may be drawn. A token of a row
        where this does not hold is any token.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    R, V = logits.shape
    if seen.shape[1:] != (V,) or bias.shape[1:] != (V,):
        raise ValueError(f"{seen.shape=} and {bias.shape=} do not fit {logits.shape=}")
    vectors = (state_row, bias_row, repetition_penalty, frequency_penalty, presence_penalty)
    vectors += (temperature, min_p, top_k, top_p, step)
    if any(vector.shape != (R,) for vector in vectors) or seed.shape != (R, 2):
        shapes = [vector.shape for vector in vectors]
        raise ValueError(f"parameters {shapes} and {seed.shape=} do not fit {logits.shape=}")
    reason = mosaic_gpu_unsupported(logits)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("sampling", implementation, preferred)
    arrays = (logits, seen, bias, *vectors[:-1], seed, step)
    if chosen == "xla":
        return reference.sampling(*arrays)
    if reason:
        raise ValueError(f"sampling: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.sampling(*arrays, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(logits: Array, *_: Array) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `sampling`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(logits)
