"""From logits to tokens. Pure; runs inside the step program.

The work is that of two operations, `pallas_kernels.verification` (which draws by
`pallas_kernels.sampling`) and `pallas_kernels.logprobs`; here they get each row's parameters, and
what was drawn is counted. A request's text does not depend on what else is in the batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from arctic_jax.batch import ForwardBatch, StepOutput
from arctic_jax.pallas_kernels.logprobs import logprobs
from arctic_jax.pallas_kernels.sampling.reference import IN_PROMPT as IN_PROMPT
from arctic_jax.pallas_kernels.verification import verification

MASKS_A_CALL = 16
"""Masks are sent in groups: one program for all numbers of them, and few bytes for one."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["seen", "bias"], meta_fields=[])
@dataclass(frozen=True)
class SamplerState:
    """What penalties, biases and grammars need to know of running requests, on the device.

    Only the rows of requests whose parameters adjust logits are ever read. Where a grammar masks
    tokens, the bias is that of a row behind those of the requests, which is made for the step.

    Attributes:
        seen: `[max_num_seqs, vocab]` int32, see `IN_PROMPT`.
        bias: `[max_num_seqs + masks, vocab]` float32, added to the logits; -inf forbids a token.
    """

    seen: Array
    bias: Array

    @staticmethod
    def shapes(max_num_seqs: int, vocab_size: int, max_masks: int = 0) -> SamplerState:
        """Return the state's shapes and types; masks come in whole groups of `MASKS_A_CALL`."""
        masks = -(-max_masks // MASKS_A_CALL) * MASKS_A_CALL
        seen = jax.ShapeDtypeStruct((max_num_seqs, vocab_size), jnp.int32)
        bias = jax.ShapeDtypeStruct((max_num_seqs + masks, vocab_size), jnp.float32)
        return SamplerState(seen, bias)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def zeros(max_num_seqs: int, vocab_size: int, max_masks: int = 0) -> SamplerState:
        """Make the state of an engine without requests."""
        shapes = SamplerState.shapes(max_num_seqs, vocab_size, max_masks)
        return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), shapes)

    @staticmethod
    def bytes(max_num_seqs: int, vocab_size: int, max_masks: int = 0) -> int:
        """Memory of the state, on each device."""
        shapes = SamplerState.shapes(max_num_seqs, vocab_size, max_masks)
        return sum(4 * array.size for array in jax.tree.leaves(shapes))


def set_row(state: SamplerState, row: Array, seen: Array, bias: Array) -> SamplerState:
    """Replace one request's row: `seen [vocab]`, `bias [vocab]`."""
    return SamplerState(seen=state.seen.at[row].set(seen), bias=state.bias.at[row].set(bias))


def set_masks(state: SamplerState, first: Array, masks: Array, rows: Array) -> SamplerState:
    """Make `MASKS_A_CALL` rows of masked biases, from the mask `first` on.

    Args:
        state: to change.
        first: a multiple of `MASKS_A_CALL`.
        masks: `[MASKS_A_CALL, ceil(vocab / 32)]` int32, a bit for each token that may be drawn, the
            first token's the lowest.
        rows: `[MASKS_A_CALL]` whose biases are masked.
    """
    bits = (masks[:, :, None] >> jnp.arange(32)) & 1
    allowed = bits.reshape(len(masks), -1)[:, : state.bias.shape[1]] > 0
    bias = jnp.where(allowed, state.bias[rows], -jnp.inf)
    begin = (state.seen.shape[0] + first, jnp.int32(0))
    return SamplerState(seen=state.seen, bias=jax.lax.dynamic_update_slice(state.bias, bias, begin))


def _row_masks(batch: ForwardBatch) -> Array | None:
    """Return which rows before it each row comes after, if drafts may be trees."""
    return None if batch.draft_mask is None else batch.draft_mask[jnp.maximum(batch.logit_rows, 0)]


def sample(
    logits: Array,
    batch: ForwardBatch,
    state: SamplerState,
    max_logprobs: int,
    max_draft_len: int = 0,
    implementation: str | None = None,
) -> tuple[StepOutput, SamplerState]:
    """Draw a token for each row of `logits [R, vocab]` (float32), and report log-probabilities.

    Log-probabilities are those of the model, before masks, penalties and the rest. Rows may
    verify drafts of at most `max_draft_len` tokens. For `implementation` see `dispatch.resolve`.
    """
    seq = batch.row_seq
    # Rows of prompt positions and of padding draw for nobody, so they take the likeliest.
    draws = batch.row_target < 0
    state_row = jnp.where(draws, batch.state_row[seq], -1)
    masked_row = state.seen.shape[0] + batch.row_mask
    tokens, finite = verification(
        logits,
        state.seen,
        state.bias,
        state_row,
        jnp.where(batch.row_mask < 0, state_row, masked_row),
        batch.repetition_penalty[seq],
        batch.frequency_penalty[seq],
        batch.presence_penalty[seq],
        jnp.where(draws, batch.temperature[seq], 0.0),
        batch.min_p[seq],
        batch.top_k[seq],
        batch.top_p[seq],
        batch.seed[seq],
        batch.row_step,
        batch.row_draft,
        _row_masks(batch),
        max_draft_len=max_draft_len,
        implementation=implementation,
    )
    # Rows without state, and those after a rejected draft, fall outside and are dropped.
    counted = jnp.where((state_row >= 0) & (tokens >= 0), state_row, state.seen.shape[0])
    seen = state.seen.at[counted, tokens].add(1, mode="drop")
    target = jnp.where(draws, jnp.maximum(tokens, 0), batch.row_target)
    report = logprobs(
        logits, target, batch.want_logprobs, top=max_logprobs, implementation=implementation
    )
    drafts = jnp.zeros((len(tokens), 0), jnp.int32)
    return StepOutput(tokens, finite, *report, drafts), SamplerState(seen=seen, bias=state.bias)
