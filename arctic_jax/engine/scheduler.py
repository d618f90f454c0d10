"""Which tokens of which requests the next step computes. Host only, no jax.

Owned by the engine thread. There are no phases: a request has computed some of its tokens and
catches up, a prompt in chunks, a running answer by one token, one that was preempted from the
start. Running requests come first, then waiting ones, under one budget of tokens.
"""

from __future__ import annotations

import bisect
import time

from arctic_jax.config import StepLimits
from arctic_jax.engine.block_pool import BlockPool
from arctic_jax.request import Request, RequestStatus
from arctic_jax.scheduled_batch import MAX_TOKENS_OF_ROUNDS, ScheduledBatch, ScheduledRequest


class Scheduler:
    """Continuous batching with chunked prefill, prefix caching and preemption by recomputing.

    While somebody reads an answer as it grows, prompts get only a part of each step's tokens: the
    steps stay short, and streams do not wait for somebody else's long prompt.

    Args:
        pool: the cache's blocks.
        limits: of a step.
        max_extra_rows: rows of logits of one step for prompt log-probabilities and drafts.
        by_priority: lower `Request.priority` goes first; else first come, first served.
        num_rounds: of a step in which nobody needs the host between its tokens.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: StepLimits,
        max_extra_rows: int,
        by_priority: bool = False,
        num_rounds: int = 1,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.max_extra_rows = max_extra_rows
        self.by_priority = by_priority
        self.max_rounds = num_rounds
        self._drafts = False  # whether the step before the next one drafts
        # Both in the order in which requests are served; victims are taken from the end.
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self._order: dict[Request, tuple[int, int]] = {}
        self._arrivals = 0
        self._free_slots = list(range(limits.max_num_seqs))[::-1]

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self._order[request] = (request.priority if self.by_priority else 0, self._arrivals)
        self._arrivals += 1
        self._enqueue(self.waiting, request)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request, wherever it is, and give its blocks back. A second end is ignored."""
        if request.status.finished:
            return
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if status is RequestStatus.FAILED:  # what it wrote may be damaged
            for block in request.block_ids[request.num_cached_tokens // self.pool.block_size :]:
                self.pool.forget(block)
        self._release(request)
        del self._order[request]
        request.status = status

    @property
    def has_requests(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self.waiting)

    @property
    def num_requests(self) -> int:
        """Running and waiting ones."""
        return len(self._order)

    def schedule(self, drafts: bool = False) -> ScheduledBatch:
        """Choose the next step's tokens and allocate their blocks; empty if there are none.

        `drafts` is whether the step shall draft on the device.
        """
        chosen: list[ScheduledRequest] = []
        if not self._drafts:
            for request in self.running:
                request.num_drafted_ahead = 0
        tokens, rows = self.limits.max_num_batched_tokens, self.max_extra_rows
        streams = sum(r.is_streaming for r in self.running)
        mixed = self.limits.max_num_mixed_tokens
        prefill = max(mixed - streams, mixed // 2, 1) if streams else tokens
        # Those that wait for their tokens wait for each other, too, and so share their steps.
        held_up = any(r.holds_others_up for r in self.running)
        num_drafts = sum(r.has_draft for r in self.running)
        rows_of_draft = max(rows // num_drafts, 1) if num_drafts else rows
        preempted = False
        num_rounds, drafts = self._rounds(drafts)

        i = 0
        while i < len(self.running) and tokens:
            request = self.running[i]
            if request.waits_for_tokens:
                i += 1
                continue
            start = request.num_computed_tokens
            missing = len(request.token_ids) - start
            most = tokens if missing == 1 else min(tokens, prefill)
            most_rows = min(rows, rows_of_draft) if num_drafts and request.has_draft else rows
            part = ScheduledRequest.plan(request, start, most, most_rows)
            waits = part.samples and (
                (held_up and request.goes_with_others) or request.waits_for_masks
            )
            if waits or part.num_tokens < 1:  # none, or no rows, are left for its prompt
                i += 1
                continue
            if num_rounds > 1:
                if part.num_drafted and not self._has_room(request):
                    part = part.known_tokens()
                part.num_rounds = min(num_rounds, request.max_tokens - request.num_drawn)
            optional = part.num_drafted or part.num_rounds > 1
            if optional and not self._extend(request, part.end):
                part = part.known_tokens()  # nobody is preempted for a guess, or a later round
            while not self._extend(request, part.end):
                preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            else:
                self._choose(part, chosen)
                tokens -= part.num_tokens
                prefill -= part.num_tokens if missing > 1 else 0
                rows -= part.num_extra_rows
                i += 1

        # After a preemption memory is short: taking somebody new in would only preempt again.
        room = 0 if preempted else self.limits.max_num_seqs - len(self.running)
        while self.waiting and room and (most := min(tokens, prefill)):
            request = self.waiting[0]
            self._attach_prefix(request)
            part = ScheduledRequest.plan(request, request.num_computed_tokens, most, rows)
            waits = part.samples and request.waits_for_masks
            if part.num_tokens < 1 or waits or not self._extend(request, part.end):
                self._detach(request)
                break
            self.waiting.pop(0)
            self._start(request)
            self._choose(part, chosen)
            room -= 1
            tokens -= part.num_tokens
            prefill -= part.num_tokens
            rows -= part.num_extra_rows

        if chosen:
            self._drafts = drafts
        return ScheduledBatch(tuple(chosen), drafts, num_rounds)

    def _rounds(self, drafts: bool) -> tuple[int, bool]:
        """Return how many rounds the next step has, and whether it drafts.

        One if somebody would have to wait. Several need to know what each round begins with: the
        token that the one before drew, and what it drafted, for those that verify.
        """
        is_full = len(self.running) == self.limits.max_num_seqs
        if self.max_rounds == 1 or (self.waiting and not is_full):
            return 1, drafts
        live = [request for request in self.running if not request.all_drawn]
        if any(not r.only_draws or r.needs_host or r.draft for r in live):
            return 1, drafts
        drafted = [r.num_unseen_draft if self._has_room(r) else 0 for r in live]
        if len(live) + sum(drafted) > MAX_TOKENS_OF_ROUNDS or (any(drafted) and not drafts):
            return 1, drafts
        # Where nobody verifies yet, the first drafts are made by a step of one round.
        begins = drafts and not any(drafted) and any(self._has_room(r) for r in live)
        return (1, True) if begins else (self.max_rounds, any(drafted))

    def _has_room(self, request: Request) -> bool:
        """Whether it can verify a draft in every round, and all may be right."""
        longest = max(request.num_drafted_ahead, 1)
        return request.max_tokens - request.num_drawn >= self.max_rounds * (1 + longest)

    def held_blocks(self) -> list[list[int]]:
        """Blocks of every request in the engine, for `BlockPool.check`."""
        return [request.block_ids for request in self._order]

    def _extend(self, request: Request, num_tokens: int) -> bool:
        """Give a request the blocks for its first `num_tokens` tokens; all of them or none."""
        missing = num_tokens - len(request.block_ids) * self.pool.block_size
        if missing > 0:
            blocks = self.pool.allocate(-(-missing // self.pool.block_size))
            if blocks is None:
                return False
            request.block_ids.extend(blocks)
        return True

    def _attach_prefix(self, request: Request) -> None:
        """Take over the cached blocks of the request's beginning.

        The last token is always computed: its logits are wanted. Prompt log-probabilities want
        the logits of all, so those requests take nothing over.
        """
        pool = self.pool
        if request.wants_prompt_rows or not pool.enable_prefix_caching:
            return
        hashes = pool.hashes(request.token_ids, request.block_hashes, request.cache_salt)
        blocks = pool.find(hashes[: (request.num_tokens - 1) // pool.block_size])
        pool.share(blocks)
        request.block_ids = blocks
        request.num_computed_tokens = len(blocks) * pool.block_size
        request.num_cached_tokens = request.num_computed_tokens

    def _detach(self, request: Request) -> None:
        self._release(request)
        request.num_computed_tokens = request.num_cached_tokens = 0

    def _start(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        request.slot = self._free_slots.pop()
        if request.first_scheduled_time is None:
            request.first_scheduled_time = time.monotonic()
        self._enqueue(self.running, request)

    def _preempt(self, request: Request) -> None:
        """Send a running request back to wait; it will compute all its tokens again."""
        self.running.remove(request)
        self._detach(request)
        request.draft = request.draft_parents = ()
        request.num_drafted_ahead = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self._enqueue(self.waiting, request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_published_blocks = 0
        if request.slot >= 0:
            self._free_slots.append(request.slot)
            request.slot = -1

    def _choose(self, part: ScheduledRequest, chosen: list[ScheduledRequest]) -> None:
        """Put a part into the step, and make the blocks it fills findable.

        Already before the step runs: within it, each layer writes all keys and values before it
        reads any, so a request of the same step may share them. A request that was chosen is not
        preempted any more in this step: victims come from the end of `running`.
        """
        chosen.append(part)
        request, end = part.request, part.end
        request.num_computed_tokens = end
        if part.samples:
            request.expect_tokens(part.num_rounds, part.num_rounds * part.num_drafted)
        known = min(end, len(request.token_ids) - request.num_pending)
        full = known // self.pool.block_size
        if full == request.num_published_blocks:
            return
        hashes = self.pool.hashes(
            request.token_ids[:known], request.block_hashes, request.cache_salt
        )
        for i in range(request.num_published_blocks, min(full, len(hashes))):
            self.pool.publish(request.block_ids[i], hashes[i])
        request.num_published_blocks = full

    def _enqueue(self, queue: list[Request], request: Request) -> None:
        bisect.insort(queue, request, key=self._order.__getitem__)
