"""Steps of several rounds: each round's batch, from what the one before drew. Pure.

A round is a pass through the model that draws the next tokens of every sequence: one, or what is
right of a draft and one more. While nobody needs the host in between, one launch does for several
(multi-step scheduling), so that a small model is not as slow as the host that launches it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from arctic_jax.batch import ForwardBatch, StepOutput, sequence_of_tokens, slots_of

SMALL_MODELS_ROUNDS = 4
"""Eight are no faster (benchmarks/results/h200/rounds_smollm2-135m.json)."""


def by_default(num_bytes: int, num_layers: int) -> int:
    """Return the rounds of a step on one GPU: several where it is done before the host.

    A layer's launch takes the host some 25 us, a GPU reads 4.3 TB/s (docs/tuning.md).

    Args:
        num_bytes: of the weights.
        num_layers: of the model.
    """
    return SMALL_MODELS_ROUNDS if num_bytes / 4.3e12 < 25e-6 * num_layers else 1


class Progress(NamedTuple):
    """How far a step has come when a round begins.

    Attributes:
        drawn: `[S]` tokens that the rounds before drew.
        token_ids: `[T]` of the round: of each sequence its last token, and a draft.
    """

    drawn: Array
    token_ids: Array


def begin(batch: ForwardBatch) -> Progress:
    """Return where the first round stands."""
    return Progress(jnp.zeros_like(batch.seq_lens), batch.token_ids)


def batch_of(
    batch: ForwardBatch, progress: Progress, index: Array, block_size: int
) -> ForwardBatch:
    """Return a round's batch.

    A sequence that draws nothing any more repeats its last token: without writing, for nobody.
    Only sequences without drafts may have fewer rounds than the step.

    Args:
        batch: of the first round.
        progress: see there.
        index: `[]` of the round.
        block_size: of the cache.
    """
    assert batch.num_rounds is not None
    draws, seq = index < batch.num_rounds, sequence_of_tokens(batch)
    ahead = jnp.where(draws, progress.drawn, jnp.maximum(batch.num_rounds - 1, 0))
    positions = batch.positions + ahead[seq]
    slots = slots_of(batch.block_tables, seq, positions, block_size)
    after = progress.token_ids[jnp.minimum(batch.logit_rows + 1, len(seq) - 1)]
    return replace(
        batch,
        token_ids=progress.token_ids,
        positions=positions,
        slot_mapping=jnp.where(draws[seq] & (batch.slot_mapping >= 0), slots, -1),
        seq_lens=batch.seq_lens + ahead,
        row_step=batch.row_step + ahead[batch.row_seq],
        row_draft=jnp.where(batch.row_draft < 0, -1, after),
        state_row=jnp.where(draws, batch.state_row, -1),
    )


def advance(
    current: ForwardBatch, progress: Progress, output: StepOutput, index: Array
) -> tuple[Progress, StepOutput]:
    """Return where the next round stands, and the round's output without what nobody asked for.

    Args:
        current: the round's batch, see `batch_of`.
        progress: where it stood.
        output: what it drew, and drafted for the next one.
        index: `[]` of the round.
    """
    assert current.num_rounds is not None
    num_seqs, num_drafted = len(current.seq_lens), output.drafts.shape[1]
    draws = (index < current.num_rounds)[current.row_seq] & (current.row_target < 0)
    output = replace(output, token_ids=jnp.where(draws, output.token_ids, -1))
    counts = draws & (output.token_ids >= 0)
    row = jnp.where(counts, jnp.arange(len(draws)), -1)
    last = jnp.full(num_seqs, -1).at[current.row_seq].max(row)
    drawn = progress.drawn.at[current.row_seq].add(counts.astype(jnp.int32))
    seq = sequence_of_tokens(current)
    token_ids = jnp.maximum(output.token_ids[jnp.maximum(last, 0)], 0)[seq]
    if current.max_query_len > 1:
        place = jnp.arange(len(seq)) - current.query_start_loc[seq]
        drafts = output.drafts[seq, jnp.clip(place - 1, 0, num_drafted - 1)]
        token_ids = jnp.where(place == 0, token_ids, jnp.maximum(drafts, 0))
    return Progress(drawn, token_ids), output
