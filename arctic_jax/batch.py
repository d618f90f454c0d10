"""One step as the device sees it: `ForwardBatch` goes in, `StepOutput` comes out. Vocabulary.

The host packs everything a step needs into one int32 array, because each argument of a program
costs host time; the program unpacks it by static offsets. What comes back is one array, too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from arctic_jax.scheduled_batch import Bucket


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "token_ids",
        "token_source",
        "before_row",
        "before_drafted",
        "before_stride",
        "before_rounds",
        "positions",
        "slot_mapping",
        "query_start_loc",
        "seq_lens",
        "block_tables",
        "logit_rows",
        "row_seq",
        "row_target",
        "row_step",
        "row_draft",
        "draft_mask",
        "row_mask",
        "state_row",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "want_logprobs",
        "num_rounds",
    ],
    meta_fields=["max_query_len"],
)
@dataclass(frozen=True)
class ForwardBatch:
    """The device's view of a step. T tokens, S sequences, R rows of logits, B blocks a sequence.

    Attributes:
        token_ids: `[T]`; padding is token 0.
        token_source: `[T]` which of the `StepOutput.tokens_of` the step before this token is; -1 if
            it is known.
        before_row: `[S]` the last row of each sequence in the step before; only read where ...
        before_drafted: `[S]` ... that many drafted tokens were verified there, in each round. How
            many were right the host does not know yet: it supposes all.
        before_stride: `[]` rows of the output of a round of that step ...
        before_rounds: `[]` ... and how many rounds it had.
        positions: `[T]` of each token in its sequence.
        slot_mapping: `[T]` where its key and value go; -1 for padding.
        query_start_loc: `[S+1]`; empty slots repeat the end.
        seq_lens: `[S]` tokens in the cache after the writes; 0 for an empty slot.
        block_tables: `[S, B]`.
        logit_rows: `[R]` tokens whose logits are wanted; -1 for padding, which comes last.
        row_seq: `[R]` the sequence of each row.
        row_target: `[R]` the token whose log-probability is reported; -1 for the one drawn.
            Padding has target 0, so that its draws count for nobody.
        row_step: `[R]` how many tokens were drawn before: with `seed` it makes the random key.
        row_draft: `[R]` the drafted token that the next row comes after; -1 for none, and
            `UNSEEN_DRAFT` for one that the host does not know.
        draft_mask: `[T]` which tokens before it a token sees, see `paged_attention`; `None` where
            there are no drafts that are trees. Their tokens lie in the cache one after the other,
            as if they were a path, but have the positions that they would have in the answer.
        row_mask: `[R]` the mask of tokens that may be drawn, see `SamplerState`; -1 for none.
        state_row: `[S]` row of the sampler's state, or -1 if logits are not adjusted.
        temperature: `[S]`, and so on for the other sampling parameters.
        seed: `[S, 2]` words of a 64-bit seed.
        want_logprobs: `[]`, whether any row reports log-probabilities.
        num_rounds: `[S]` in how many of the step's rounds each sequence draws; `None` in a step of
            one round.
        max_query_len: see `Bucket`.
    """

    token_ids: Array
    token_source: Array
    before_row: Array
    before_drafted: Array
    before_stride: Array
    before_rounds: Array
    positions: Array
    slot_mapping: Array
    query_start_loc: Array
    seq_lens: Array
    block_tables: Array
    logit_rows: Array
    row_seq: Array
    row_target: Array
    row_step: Array
    row_draft: Array
    draft_mask: Array | None
    row_mask: Array
    state_row: Array
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    presence_penalty: Array
    frequency_penalty: Array
    repetition_penalty: Array
    seed: Array
    want_logprobs: Array
    num_rounds: Array | None
    max_query_len: int


UNSEEN_DRAFT = -2
# Words between the beginnings of packed fields: a kernel may get a field as a piece of the packed
# array, without a copy, and wants it aligned to 256 bytes.
_ALIGNMENT = 64
_FLOATS = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    }
)


def _shapes(bucket: Bucket, max_blocks: int) -> dict[str, tuple[int, ...]]:
    T, R, S = bucket.num_tokens, bucket.num_rows, bucket.num_seqs
    special = {"query_start_loc": (S + 1,), "block_tables": (S, max_blocks), "seed": (S, 2)}
    special |= dict.fromkeys(("want_logprobs", "before_stride", "before_rounds"), ())
    shapes = {}
    for f in fields(ForwardBatch):
        if f.name in ("token_ids", "token_source", "positions", "slot_mapping"):
            shapes[f.name] = (T,)
        elif f.name == "draft_mask":
            shapes |= {f.name: (T,)} if bucket.has_trees else {}
        elif f.name == "num_rounds":
            shapes |= {f.name: (S,)} if bucket.num_rounds > 1 else {}
        elif f.name == "logit_rows" or f.name.startswith("row_"):
            shapes[f.name] = (R,)
        elif f.name != "max_query_len":
            shapes[f.name] = special.get(f.name, (S,))
    return shapes


@functools.cache
def _layout(bucket: Bucket, max_blocks: int) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Return each field's offset and shape, and the size of the whole, in int32 words."""
    offsets, size = {}, 0
    for name, shape in _shapes(bucket, max_blocks).items():
        offsets[name] = (size, shape)
        size += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return offsets, size


def packed_size(bucket: Bucket, max_blocks: int) -> int:
    """Int32 words of a packed batch."""
    return _layout(bucket, max_blocks)[1]


def host_views(
    packed: np.ndarray[tuple[int], np.dtype[np.int32]], bucket: Bucket, max_blocks: int
) -> dict[str, np.ndarray]:
    """Views into a packed host array, one a field, of the field's shape and type."""
    views = {}
    for name, (start, shape) in _layout(bucket, max_blocks)[0].items():
        view = packed[start : start + math.prod(shape)].reshape(shape)
        views[name] = view.view(np.float32) if name in _FLOATS else view
    return views


def unpack(packed: Array, bucket: Bucket, max_blocks: int) -> ForwardBatch:
    """Rebuild the batch inside the program."""
    values: dict[str, Any] = {"draft_mask": None, "num_rounds": None}
    for name, (start, shape) in _layout(bucket, max_blocks)[0].items():
        value = packed[start : start + math.prod(shape)].reshape(shape)
        values[name] = lax.bitcast_convert_type(value, jnp.float32) if name in _FLOATS else value
    return ForwardBatch(**values, max_query_len=bucket.max_query_len)


def resolve(
    batch: ForwardBatch,
    before: Array,
    num_drafted: int,
    max_draft_len: int,
    max_rounds: int,
    block_size: int,
) -> ForwardBatch:
    """Put in what the host did not know when it packed the batch.

    Args:
        batch: as it was packed.
        before: the packed output of the step before.
        num_drafted: tokens of each draft in it.
        max_draft_len: most drafted tokens that it verified for a sequence in a round.
        max_rounds: most that it had.
        block_size: of the cache.
    """
    tokens, source = StepOutput.tokens_of(before, num_drafted), batch.token_source
    if not num_drafted:
        drawn = tokens[jnp.maximum(source, 0)]
        return replace(batch, token_ids=jnp.where(source < 0, batch.token_ids, drawn))
    back, rounds = jnp.arange(max_draft_len), jnp.arange(max_rounds)[:, None]
    rows = batch.before_row[:, None, None] - rounds * batch.before_stride - back
    verified = (back < batch.before_drafted[:, None, None]) & (rounds < batch.before_rounds)
    wrong_of_round = ((tokens[jnp.maximum(rows, 0)] < 0) & verified).sum(2)
    wrong, seq = wrong_of_round.sum(1), sequence_of_tokens(batch)
    is_real = batch.slot_mapping >= 0
    too_far = jnp.where(is_real, wrong[seq], 0)
    source -= jnp.where(is_real & (source < len(before)), wrong_of_round[seq, 0], 0)
    drawn = tokens[jnp.maximum(source, 0)]
    token_ids = jnp.where(batch.token_source < 0, batch.token_ids, jnp.maximum(drawn, 0))
    next_token = token_ids[jnp.minimum(batch.logit_rows + 1, len(source) - 1)]
    unseen = batch.row_draft == UNSEEN_DRAFT
    positions = batch.positions - too_far
    slots = slots_of(batch.block_tables, seq, positions, block_size)
    return replace(
        batch,
        token_ids=token_ids,
        positions=positions,
        slot_mapping=jnp.where(too_far > 0, slots, batch.slot_mapping),
        seq_lens=batch.seq_lens - wrong,
        row_step=batch.row_step - wrong[batch.row_seq],
        row_draft=jnp.where(unseen, next_token, batch.row_draft),
    )


def slots_of(block_tables: Array, seq: Array, positions: Array, block_size: int) -> Array:
    """Return where in the cache the keys and values of positions of sequences go; all `[T]`."""
    return block_tables[seq, positions // block_size] * block_size + positions % block_size


def sequence_of_tokens(batch: ForwardBatch) -> Array:
    """Return the sequence of each token; of padding the last one. `[T]`."""
    places = jnp.arange(len(batch.token_ids))
    if batch.max_query_len == 1:
        return places
    return (places[:, None] >= batch.query_start_loc[None, 1:-1]).sum(1)


def narrow(x: Array, batch: ForwardBatch) -> tuple[Array, ForwardBatch]:
    """Keep the rows of `x [T, d]` that need logits: `[R, d]`.

    With the batch as attention sees it from there on: R sequences of one query each, that end with
    it. What the sampler reads stays as it is.
    """
    real = batch.logit_rows >= 0
    rows = jnp.maximum(batch.logit_rows, 0)
    positions = batch.positions[rows]
    seq_lens, draft_mask = positions + 1, batch.draft_mask
    if draft_mask is not None:  # tokens of trees have more before them than their positions say
        seq = batch.row_seq
        seq_lens = batch.seq_lens[seq] - (batch.query_start_loc[seq + 1] - 1 - rows)
        draft_mask = draft_mask[rows]
    return x[rows], replace(
        batch,
        positions=positions,
        draft_mask=draft_mask,
        slot_mapping=jnp.full_like(rows, -1),
        query_start_loc=jnp.minimum(jnp.arange(len(rows) + 1), real.sum()),
        seq_lens=jnp.where(real, seq_lens, 0),
        block_tables=batch.block_tables[batch.row_seq],
        max_query_len=1,
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "token_ids",
        "finite",
        "logprob",
        "rank",
        "top_token_ids",
        "top_logprobs",
        "drafts",
    ],
    meta_fields=[],
)
@dataclass(frozen=True)
class StepOutput:
    """What a step gives back, a row of logits each.

    Attributes:
        token_ids: `[R]` the tokens drawn; -1 for a row that comes after a rejected draft.
        finite: `[R]` whether the logits were finite numbers.
        logprob: `[R]` of the row's target (see `ForwardBatch.row_target`); 0 if none was wanted.
        rank: `[R]` of the target, 1 for the most likely token.
        top_token_ids: `[R, L]` the most likely tokens.
        top_logprobs: `[R, L]`.
        drafts: `[R, K]` what a drafter on the device thinks comes after the last token drawn for
            each of the first sequences, which are at most R; -1 after a shorter draft. K is 0
            without a drafter.
    """

    token_ids: Array
    finite: Array
    logprob: Array
    rank: Array
    top_token_ids: Array
    top_logprobs: Array
    drafts: Array

    @staticmethod
    def width(max_logprobs: int, num_drafted: int) -> int:
        """Columns of a packed output."""
        return 4 + 2 * max_logprobs + num_drafted

    @staticmethod
    def tokens_of(packed: Array, num_drafted: int) -> Array:
        """Return the tokens of a packed output, and behind them its drafts, row by row."""
        drafts = packed[:, packed.shape[1] - num_drafted :]
        return jnp.concatenate([packed[:, 0], drafts.ravel()])

    def pack(self) -> Array:
        """Put everything into one int32 array `[R, width]`: each array read costs host time."""
        floats = [self.logprob[:, None], self.top_logprobs]
        ints = [self.token_ids[:, None], self.finite[:, None], self.rank[:, None]]
        words = [lax.bitcast_convert_type(x, jnp.int32) for x in floats]
        return jnp.concatenate(
            [*(x.astype(jnp.int32) for x in ints), self.top_token_ids, *words, self.drafts], 1
        )


@dataclass(frozen=True)
class HostOutput:
    """A `StepOutput` on the host, without the rows that were padding; the same names.

    Only `drafts` has a row for each sequence that may draft, or more, not for each row of logits.
    What every row is asked for is a list: one number of an array takes ten times as long to read.
    """

    token_ids: list[int]
    finite: list[bool]
    rank: np.ndarray
    top_token_ids: np.ndarray
    logprob: np.ndarray
    top_logprobs: np.ndarray
    drafts: np.ndarray
    stride: int = 0
    """Rows of each round of the step."""

    def drafts_of(self, index: int, count: int) -> list[list[int]]:
        """Return what a round drafted for the first sequences."""
        begin = index * self.stride
        return self.drafts[begin : begin + count].tolist()

    @staticmethod
    def unpack(packed: np.ndarray, rows: int, num_drafted: int, stride: int) -> HostOutput:
        """Take the outputs of a step's rounds apart, see `StepOutput.pack`."""
        width = packed.shape[1] - num_drafted
        drafts, packed = packed[:, width:], packed[:rows, :width]
        most = (width - 4) // 2
        floats = np.ascontiguousarray(packed[:, 3 + most :]).view(np.float32)
        return HostOutput(
            token_ids=packed[:, 0].tolist(),
            finite=(packed[:, 1] > 0).tolist(),
            rank=packed[:, 2],
            top_token_ids=packed[:, 3 : 3 + most],
            logprob=floats[:, 0],
            top_logprobs=floats[:, 1:],
            drafts=drafts,
            stride=stride,
        )
