"""One step's work: `ScheduledBatch` on the host, `ForwardBatch` on the device, `Bucket` its shape.

Vocabulary. The host packs everything a step needs into one int32 array, because each argument of a
program costs host time; the program unpacks it by static offsets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from arctic_jax.request import Request


@dataclass(slots=True)  # frozen ones take three times as long to make, and each step makes many
class ScheduledRequest:
    """A part of a request's tokens, computed in one step.

    Attributes:
        request: whose.
        start: position of the first token.
        num_tokens: how many.
        num_rows: the last so many of them have a row of logits.
        samples: the last known token is among them, so that a new one is drawn.
        num_drafted: the last so many are drafted, to be verified.
        num_accepted: how many of those turned out to be right.
        parents: of each drafted token the index of the one that it follows, -1 for the last known
            token; empty if each follows the one before it.
        accepted: of a draft with `parents` the indices of the tokens that turned out to be right.
        first_mask: of the step's masks, that of the first row that draws; the next rows have the
            next ones. -1 if nothing is masked.
        unseen: the host does not know the drafted tokens: the device made them in the step before,
            which may also have accepted fewer tokens than `start` supposes.
    """

    request: Request
    start: int
    num_tokens: int
    num_rows: int
    samples: bool
    num_drafted: int = 0
    num_accepted: int = 0
    parents: Sequence[int] = ()
    accepted: Sequence[int] = ()
    first_mask: int = -1
    unseen: bool = False

    @staticmethod
    def plan(request: Request, start: int, max_tokens: int, max_rows: int) -> ScheduledRequest:
        """Take as many tokens from `start` on as the limits allow; perhaps none.

        `max_rows` are those beyond one: for the prompt's log-probabilities, or for a draft.
        """
        known = len(request.token_ids)
        end = min(start + max_tokens, known)
        samples = end == known
        first_row = end - samples
        if request.wants_prompt_rows:  # those that are not known from before a preemption
            first_row = max(start, min(len(request.prompt_logprobs) - 1, end))
            if end - first_row > max_rows:
                end, samples = first_row + max_rows, False
            return ScheduledRequest(request, start, end - start, end - first_row, samples)
        drafted = 0
        if samples and (wanted := len(request.draft) or request.num_unseen_draft):
            drafted = min(wanted, start + max_tokens - end, max_rows)
        return ScheduledRequest(
            request,
            start,
            end - start + drafted,
            samples + drafted,
            samples,
            drafted,
            unseen=drafted > 0 and not request.draft,
            parents=request.draft_parents[:drafted],
        )

    def without_draft(self) -> ScheduledRequest:
        """Return it with the known tokens only."""
        tokens, rows = self.num_tokens - self.num_drafted, self.num_rows - self.num_drafted
        return ScheduledRequest(self.request, self.start, tokens, rows, self.samples)

    @property
    def num_draws(self) -> int:
        """Rows that draw a token, the last ones."""
        return self.samples + self.num_drafted

    @property
    def num_extra_rows(self) -> int:
        """Rows beyond the one that every request may have."""
        return self.num_rows - self.samples

    @property
    def end(self) -> int:
        """Tokens in the cache after the step, drafted ones included."""
        return self.start + self.num_tokens

    @property
    def moves(self) -> list[tuple[int, int]]:
        """Which tokens in the cache must move, and where to, for the accepted ones to be a path.

        Ascending, and each to where it is or before it.
        """
        first = self.end - self.num_drafted
        return [(first + a, first + i) for i, a in enumerate(self.accepted) if a != i]


@dataclass(frozen=True)
class ScheduledBatch:
    """What the scheduler chose for one step, in the order of the batch."""

    requests: tuple[ScheduledRequest, ...]

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(r.num_tokens for r in self.requests)

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of logits of the step."""
        return sum(r.num_rows for r in self.requests)

    @functools.cached_property
    def num_drafted(self) -> int:
        """Drafted tokens of the step."""
        return sum(r.num_drafted for r in self.requests)

    @functools.cached_property
    def max_query_len(self) -> int:
        """Most tokens of one request."""
        return max(r.num_tokens for r in self.requests)


@dataclass(frozen=True)
class Bucket:
    """The static shape of a step. Only these shapes are compiled.

    Sorted by what a step costs: a shape for drafts costs more than one of as many tokens without.

    Attributes:
        num_tokens: T, tokens of the step.
        num_rows: R, rows of logits.
        num_seqs: S, sequences.
        max_query_len: most tokens of one sequence; 1 for a decode step, where T == S == R. Only
            where R > S there may be drafts.
        has_trees: whether drafts may be trees.
    """

    num_tokens: int
    num_rows: int
    num_seqs: int
    max_query_len: int
    has_trees: bool = False

    def __lt__(self, other: Bucket) -> bool:
        """See above."""
        return self._cost < other._cost

    @functools.cached_property
    def _cost(self) -> tuple[int, ...]:
        return self.num_tokens, self.max_query_len, self.num_rows, self.num_seqs

    def fits(self, batch: ScheduledBatch) -> bool:
        """Whether the batch can be padded to this shape."""
        return (
            batch.num_tokens <= self.num_tokens
            and batch.num_rows <= self.num_rows
            and len(batch.requests) <= self.num_seqs
            and batch.max_query_len <= self.max_query_len
            and (self.num_rows > self.num_seqs or not batch.num_drafted)
        )

    @staticmethod
    def fit(batch: ScheduledBatch, buckets: Iterable[Bucket]) -> Bucket:
        """Return the smallest of the sorted `buckets` that fits.

        Raises:
            ValueError: none fits; the scheduler's limits and the ladder disagree.
        """
        for bucket in buckets:
            if bucket.fits(batch):
                return bucket
        raise ValueError(
            f"no bucket for {batch.num_tokens} tokens, {batch.num_rows} rows, "
            f"{len(batch.requests)} sequences of at most {batch.max_query_len}"
        )


def bucket_ladder(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_extra_rows: int,
    multiple: int,
    max_draft_len: int = 0,
    drafts_trees: bool = False,
) -> tuple[Bucket, ...]:
    """Return the sorted shapes that are compiled.

    Decode steps come in a ladder of sequences, mixed steps in a ladder of tokens, and two shapes
    have rows of logits for many tokens (prompt log-probabilities), if any. With drafts all mixed
    steps come with many rows, too, and steps that only verify and decode have a ladder of tokens.

    Args:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of the largest step.
        max_extra_rows: rows for prompt log-probabilities and drafts, beside one for each
            sequence; 0 for an engine that has neither.
        multiple: token counts are multiples of this (devices that share the tokens).
        max_draft_len: tokens of a draft; 0 for an engine that does not speculate.
        drafts_trees: whether drafts may be trees.
    """

    def up(n: int) -> int:
        return -(-n // multiple) * multiple

    decode = {up(n) for n in _rungs(1, max_num_seqs, 64)}
    mixed = {
        up(n)
        for n in (64, *_rungs(256, max_num_batched_tokens, 512))
        if n <= max_num_batched_tokens
    }
    seqs = max(decode)
    ladder = {Bucket(n, n, n, 1) for n in decode}
    ladder |= {Bucket(n, seqs, seqs, n) for n in mixed}
    if max_extra_rows:
        many = {up(max_extra_rows), *(mixed if max_draft_len else [max(mixed)])}
        ladder |= {Bucket(n, max_extra_rows + seqs, seqs, n) for n in many}
    if max_draft_len:
        longest = 1 + max_draft_len
        most = min(max_num_seqs * longest, max_num_seqs + max_extra_rows, max_num_batched_tokens)
        verifying = {up(n) for n in _rungs(2, most, 64)}
        ladder |= {Bucket(n, n, min(n - 1, seqs), longest) for n in verifying if n > 1}
        # With the longest drafts there are few sequences, whose contexts attention can split finer.
        few = {n: min(n // longest, seqs) for n in verifying if longest <= n <= 64}
        ladder |= {Bucket(n, n, count, longest) for n, count in few.items()}
    if drafts_trees:
        ladder = {replace(b, has_trees=b.num_rows > b.num_seqs) for b in ladder}
    return tuple(sorted(ladder))


def _rungs(lowest: int, highest: int, between: int) -> list[int]:
    """Return the powers of two times `lowest` up to `highest`, and `highest`.

    From `between` on there is a rung between two powers, so that at most a third is padding. Below,
    a step's time hardly depends on its tokens: the weights must be read anyhow.
    """
    rungs, n = [], lowest
    while n < highest:
        rungs += [n, n * 3 // 2] if n >= between else [n]
        n *= 2
    return [*(rung for rung in rungs if rung < highest), highest]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "token_ids",
        "token_source",
        "before_row",
        "before_drafted",
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
        before_drafted: `[S]` ... that many drafted tokens were verified there. How many were right
            the host does not know yet: it supposes all.
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
        max_query_len: see `Bucket`.
    """

    token_ids: Array
    token_source: Array
    before_row: Array
    before_drafted: Array
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
    special["want_logprobs"] = ()
    shapes = {}
    for f in fields(ForwardBatch):
        if f.name in ("token_ids", "token_source", "positions", "slot_mapping"):
            shapes[f.name] = (T,)
        elif f.name == "draft_mask":
            shapes |= {f.name: (T,)} if bucket.has_trees else {}
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
    values: dict[str, Any] = {} if bucket.has_trees else {"draft_mask": None}
    for name, (start, shape) in _layout(bucket, max_blocks)[0].items():
        value = packed[start : start + math.prod(shape)].reshape(shape)
        values[name] = lax.bitcast_convert_type(value, jnp.float32) if name in _FLOATS else value
    return ForwardBatch(**values, max_query_len=bucket.max_query_len)


def resolve(
    batch: ForwardBatch, before: Array, num_drafted: int, max_draft_len: int, block_size: int
) -> ForwardBatch:
    """Put in what the host did not know when it packed the batch.

    Args:
        batch: as it was packed.
        before: the packed output of the step before.
        num_drafted: tokens of each draft in it.
        max_draft_len: most drafted tokens that it verified for a sequence.
        block_size: of the cache.
    """
    tokens, source = StepOutput.tokens_of(before, num_drafted), batch.token_source
    if not num_drafted:
        drawn = tokens[jnp.maximum(source, 0)]
        return replace(batch, token_ids=jnp.where(source < 0, batch.token_ids, drawn))
    back = jnp.arange(max_draft_len)
    draws = tokens[jnp.maximum(batch.before_row[:, None] - back, 0)]
    wrong = ((draws < 0) & (back < batch.before_drafted[:, None])).sum(1)
    later = jnp.arange(len(source))[:, None] >= batch.query_start_loc[None, 1:-1]
    seq = later.sum(1)
    too_far = jnp.where(batch.slot_mapping < 0, 0, wrong[seq])
    drawn = tokens[jnp.maximum(source - jnp.where(source < len(before), too_far, 0), 0)]
    token_ids = jnp.where(source < 0, batch.token_ids, jnp.maximum(drawn, 0))
    next_token = token_ids[jnp.minimum(batch.logit_rows + 1, len(source) - 1)]
    unseen = batch.row_draft == UNSEEN_DRAFT
    positions = batch.positions - too_far
    slots = batch.block_tables[seq, positions // block_size] * block_size + positions % block_size
    return replace(
        batch,
        token_ids=token_ids,
        positions=positions,
        slot_mapping=jnp.where(too_far > 0, slots, batch.slot_mapping),
        seq_lens=batch.seq_lens - wrong,
        row_step=batch.row_step - wrong[batch.row_seq],
        row_draft=jnp.where(unseen, next_token, batch.row_draft),
    )


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

    @staticmethod
    def unpack(packed: np.ndarray, rows: int, num_drafted: int) -> HostOutput:
        """Take `StepOutput.pack` apart."""
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
        )
