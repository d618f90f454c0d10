"""Verification in plain jnp, around the draw of `sampling`: the specification of its two halves.

Rows of one sequence that verify a draft are neighbours: `draft[r] >= 0` says that row `r + 1` comes
after the drafted token `draft[r]`. Such runs of rows are called chains; most are one row long.
Where a draft is a tree, its rows are a chain whose rows do not come after all before them.
"""

import jax.numpy as jnp
from jax import Array, lax

from arctic_jax.pallas_kernels.sampling.reference import IN_PROMPT


def chain_starts(draft: Array) -> Array:
    """Return the first row of each row's chain, `[R]`."""
    rows = jnp.arange(len(draft))
    begins = jnp.concatenate([jnp.ones(1, bool), draft[:-1] < 0])
    return lax.cummax(jnp.where(begins, rows, 0))


def accept(tokens: Array, draft: Array) -> Array:
    """Return the tokens drawn, -1 for those that come after a draft that was not drawn."""
    rejected = ((draft >= 0) & (tokens != draft)).astype(jnp.int32)
    before = jnp.cumsum(rejected) - rejected
    return jnp.where(before == before[chain_starts(draft)], tokens, -1)


def drafts_before(draft: Array, draft_mask: Array, max_draft_len: int) -> Array:
    """Return whether each row comes after the token `i` rows before, `[R, max_draft_len]`.

    Its own token (`i` = 0) among them; not the one before the draft.
    """
    back = jnp.arange(max_draft_len)
    drafted = jnp.arange(len(draft))[:, None] - back > chain_starts(draft)[:, None]
    return drafted & (((draft_mask[:, None] >> back) & 1) > 0)


def accept_tree(tokens: Array, draft: Array, draft_mask: Array, max_draft_len: int) -> Array:
    """Return the tokens drawn, -1 for those that come after one that was not drawn."""
    rows = jnp.arange(len(draft))
    before = drafts_before(draft, draft_mask, max_draft_len)
    # The parent is the nearest of them, or the token before the draft, with which the chain starts.
    others = before.at[:, 0].set(False)
    nearest = rows - jnp.argmax(others, axis=1)
    parent = jnp.where(others.any(axis=1), nearest, chain_starts(draft))
    wrong = tokens[parent] != draft[rows - 1]
    back = jnp.maximum(rows[:, None] - jnp.arange(max_draft_len), 0)
    return jnp.where((before & wrong[back]).any(axis=1), -1, tokens)


def anticipate(
    logits: Array,
    seen: Array,
    state_row: Array,
    repetition_penalty: Array,
    frequency_penalty: Array,
    presence_penalty: Array,
    draft: Array,
    draft_mask: Array | None,
    max_draft_len: int,
) -> Array:
    """Change logits so that penalties by `seen` give what they give when the drafts count, too.

    Only the logits of drafted tokens differ, at most `max_draft_len` a row: nothing of the size of
    the vocabulary is made for a row.
    """
    rows = jnp.arange(len(draft))[:, None]
    earlier = rows - 1 - jnp.arange(max_draft_len)
    if draft_mask is None:
        known = earlier >= chain_starts(draft)[:, None]
    else:
        known = drafts_before(draft, draft_mask, max_draft_len)
    tokens = jnp.where(known, draft[jnp.maximum(earlier, 0)], -1)
    times = (tokens[:, :, None] == tokens[:, None, :]).sum(axis=-1)
    each = jnp.maximum(tokens, 0)
    x = jnp.take_along_axis(logits, each, axis=-1)
    already = seen[jnp.maximum(state_row, 0)[:, None], each]
    repetition = repetition_penalty[:, None]
    wanted = jnp.where(x > 0, x / repetition, x * repetition)
    wanted -= frequency_penalty[:, None] * times
    wanted -= jnp.where(already & (IN_PROMPT - 1), 0.0, presence_penalty[:, None])
    # What `sampling` will apply because of `seen` is taken back here.
    undo = jnp.where(already > 0, repetition, 1.0)
    changed = jnp.where(wanted > 0, wanted * undo, wanted / undo)
    most = float(jnp.finfo(jnp.float32).max)
    changed = jnp.where(jnp.isfinite(x), jnp.clip(changed, -most, most), x)
    adjusts = known & (state_row >= 0)[:, None]
    columns = jnp.where(adjusts, tokens, logits.shape[1])  # others fall outside and are dropped
    return logits.at[rows, columns].set(changed, mode="drop")
