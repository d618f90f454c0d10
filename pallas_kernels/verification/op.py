"""Draft verification: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Bool, Float, Int

from arctic_jax.pallas_kernels.sampling import op as sampling_op
from arctic_jax.pallas_kernels.verification import reference


def verification(
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
    draft: Int[Array, " R"],
    draft_mask: Int[Array, " R"] | None = None,
    *,
    max_draft_len: int,
    implementation: str | None = None,
) -> tuple[Int[Array, " R"], Bool[Array, " R"]]:
    """Draw a token for each row of logits, and keep what would have been drawn without drafts.

    A drafted token is accepted if the row before it draws just that. For a drafter that proposes
    one token with certainty this is rejection sampling (Leviathan et al. 2023, arXiv 2211.17192):
    the token is accepted with its probability p, after penalties, temperature, top-k and the rest,
    and the draw that rejects it is one from the residual. Since each draw has the key that its
    position has without drafts, drafts do not even change which tokens are drawn.

    The draw is that of `sampling`, which documents all arguments but these:

    Args:
        step: of each row, how many tokens the request has drawn by then, drafts included.
        draft: the drafted token that the next row comes after; -1 if the next row is not of the
            same draft. So the rows of a draft of k tokens are neighbours, 1 + k of them, and the
            last one's draw is the bonus token. Penalties of each see the drafts before it.
        draft_mask: for drafts that are trees, of at most 31 tokens: bit `i` says whether the token
            `i` rows before is one that the row comes after, or (bit 0) the row's own. -1 for a row
            that comes after all before it, as all do without this argument. Tokens that come after
            the same one differ, and a draft's draws are kept along the path that they follow.
        max_draft_len: static bound on k; 0 if there are no drafts.

    Returns:
        The tokens, -1 for rows that come after a rejected draft, and whether the logits are finite
        and some token may be drawn; see `sampling`.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if draft.shape != logits.shape[:1] or max_draft_len < 0:
        raise ValueError(f"{draft.shape=} and {max_draft_len=} do not fit {logits.shape=}")
    if draft_mask is not None and (draft_mask.shape != draft.shape or max_draft_len > 31):
        raise ValueError(f"{draft_mask.shape=}, {draft.shape=}, {max_draft_len=}")
    if max_draft_len:
        penalties = (repetition_penalty, frequency_penalty, presence_penalty)
        drafts = (draft, draft_mask, max_draft_len)
        logits = reference.anticipate(logits, seen, state_row, *penalties, *drafts)
    tokens, finite = sampling_op.sampling(
        logits,
        seen,
        bias,
        state_row,
        bias_row,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        temperature,
        min_p,
        top_k,
        top_p,
        seed,
        step,
        implementation=implementation,
    )
    if not max_draft_len:
        return tokens, finite
    if draft_mask is None:
        return reference.accept(tokens, draft), finite
    return reference.accept_tree(tokens, draft, draft_mask, max_draft_len), finite


def mosaic_gpu_unsupported(logits: Array, *_: Array, **__: object) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `verification`, or `None`.

    It is the kernel of `sampling`; the rest is XLA's everywhere.
    """
    return sampling_op.mosaic_gpu_unsupported(logits)
