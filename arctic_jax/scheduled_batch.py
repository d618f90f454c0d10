"""What one step computes, as the host chooses it, and its shape. Vocabulary; host only, no jax."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from arctic_jax.request import Request

MAX_TOKENS_OF_ROUNDS = 64
"""With more tokens the device takes longer for a round than the host for a launch."""


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
        parents: of each drafted token the index of the one that it follows, -1 for the last known
            token; empty if each follows the one before it.
        accepted: of a draft with `parents` the indices of the tokens that turned out to be right.
        first_mask: of the step's masks, that of the first row that draws; the next rows have the
            next ones. -1 if nothing is masked.
        unseen: the host does not know the drafted tokens: the device made them in the step before,
            which may also have accepted fewer tokens than `start` supposes.
        num_rounds: of the step, those in which it takes part; `num_tokens`, `num_rows` and
            `num_drafted` are those of one round.
        accepted_of_rounds: how many drafted tokens turned out to be right, in each round up to
            an end.
    """

    request: Request
    start: int
    num_tokens: int
    num_rows: int
    samples: bool
    num_drafted: int = 0
    parents: Sequence[int] = ()
    accepted: Sequence[int] = ()
    first_mask: int = -1
    unseen: bool = False
    num_rounds: int = 1
    accepted_of_rounds: Sequence[int] = ()

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
        if not (samples and request.has_draft):
            return ScheduledRequest(request, start, end - start, int(samples), samples)
        wanted = len(request.draft) or request.num_unseen_draft
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

    def known_tokens(self) -> ScheduledRequest:
        """Return it without a draft, and without tokens of later rounds."""
        tokens, rows = self.num_tokens - self.num_drafted, self.num_rows - self.num_drafted
        return ScheduledRequest(self.request, self.start, tokens, rows, self.samples)

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that turned out to be right, in all rounds."""
        return sum(self.accepted_of_rounds)

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
        return self.start + self.num_tokens + self.num_later_tokens

    @property
    def num_later_tokens(self) -> int:
        """Tokens of the rounds after the first."""
        return (self.num_rounds - 1) * (1 + self.num_drafted)

    @property
    def moves(self) -> list[tuple[int, int]]:
        """Which tokens in the cache must move, and where to, for the accepted ones to be a path.

        Ascending, and each to where it is or before it.
        """
        first = self.end - self.num_drafted
        return [(first + a, first + i) for i, a in enumerate(self.accepted) if a != i]


@dataclass(frozen=True)
class ScheduledBatch:
    """What the scheduler chose for one step.

    Attributes:
        requests: in the order of the batch.
        drafts: whether the step shall draft for the next one, if there is what drafts on the
            device.
        num_rounds: see `Bucket`.
    """

    requests: tuple[ScheduledRequest, ...]
    drafts: bool = False
    num_rounds: int = 1

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of the step, of its first round."""
        return sum(r.num_tokens for r in self.requests)

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of logits of the step, of its first round."""
        return sum(r.num_rows for r in self.requests)

    @property
    def num_later_tokens(self) -> int:
        """Tokens, and rows of logits, of the rounds after the first."""
        return sum(r.num_later_tokens for r in self.requests) if self.num_rounds > 1 else 0

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
        drafts: whether the step drafts for the next one, if there is what drafts on the device.
        num_rounds: how often the step goes through the model, see `engine/rounds.py`; more than
            once only in steps that decode and verify.
    """

    num_tokens: int
    num_rows: int
    num_seqs: int
    max_query_len: int
    has_trees: bool = False
    drafts: bool = True
    num_rounds: int = 1

    def __lt__(self, other: Bucket) -> bool:
        """See above."""
        return self._cost < other._cost

    @functools.cached_property
    def _cost(self) -> tuple[int, ...]:
        shape = self.num_tokens, self.max_query_len, self.num_rows, self.num_seqs
        return *shape, self.num_rounds, self.drafts

    @property
    def num_output_rows(self) -> int:
        """Of the step's output."""
        return self.num_rows * self.num_rounds

    def fits(self, batch: ScheduledBatch) -> bool:
        """Whether the batch can be padded to this shape."""
        return (
            batch.num_tokens <= self.num_tokens
            and batch.num_rows <= self.num_rows
            and len(batch.requests) <= self.num_seqs
            and batch.max_query_len <= self.max_query_len
            and (self.num_rows > self.num_seqs or not batch.num_drafted)
            and (self.drafts or not batch.drafts)
            and self.num_rounds == batch.num_rounds
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
            f"{len(batch.requests)} sequences of at most {batch.max_query_len}, "
            f"{batch.num_rounds} rounds"
        )


def bucket_ladder(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_extra_rows: int,
    multiple: int,
    max_draft_len: int = 0,
    drafts_trees: bool = False,
    drafts_on_device: bool = False,
    least: int = 1,
    num_rounds: int = 1,
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
        drafts_on_device: whether decode steps come without drafting for the next one, too.
        least: sequences, and so tokens, that every step has room for.
        num_rounds: decode and verifying steps of few tokens come with so many rounds, too.
    """

    def up(n: int) -> int:
        return -(-max(n, least) // multiple) * multiple

    # Each sequence of a step has a token.
    decode = {up(n) for n in _rungs(1, min(max_num_seqs, max_num_batched_tokens), 64)}
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
    verifying: set[Bucket] = set()
    if max_draft_len:
        longest = 1 + max_draft_len
        most = min(max_num_seqs * longest, max_num_seqs + max_extra_rows, max_num_batched_tokens)
        tokens = {up(max(n, least + 1)) for n in _rungs(2, most, 64) if n > 1}
        verifying = {Bucket(n, n, min(n - 1, seqs), longest) for n in tokens}
        # With the longest drafts there are few sequences, whose contexts attention can split finer.
        few = {n: max(min(n // longest, seqs), least) for n in tokens if longest <= n <= 64}
        verifying |= {Bucket(n, n, count, longest) for n, count in few.items()}
    undrafting = {Bucket(n, n, n, 1, drafts=not drafts_on_device) for n in decode}
    ladder |= verifying | undrafting
    if num_rounds > 1:
        # Those that verify need the drafts of the round before, others have no use for them.
        looped = undrafting | (verifying if drafts_on_device else set())
        most = up(MAX_TOKENS_OF_ROUNDS)
        ladder |= {replace(b, num_rounds=num_rounds) for b in looped if b.num_tokens <= most}
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
