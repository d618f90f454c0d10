"""Scheduling without a model: budgets, order, preemption, prefixes, storms of aborts."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_jax.config import StepLimits
from arctic_jax.engine.block_pool import BlockPool
from arctic_jax.engine.scheduler import Scheduler
from arctic_jax.request import (
    Logprob,
    Request,
    RequestOutputKind,
    RequestStatus,
    SamplingParams,
)
from arctic_jax.scheduled_batch import Bucket, ScheduledBatch, ScheduledRequest, bucket_ladder

SIZE = 4
_names = itertools.count()


def scheduler_of(
    num_blocks: int = 32,
    max_num_seqs: int = 4,
    max_tokens: int = 16,
    max_prompt_rows: int = 8,
    by_priority: bool = False,
    caching: bool = True,
    max_mixed: int | None = None,
) -> Scheduler:
    pool = BlockPool(num_blocks, SIZE, caching)
    limits = StepLimits(max_num_seqs, max_tokens, max_mixed or max_tokens)
    return Scheduler(pool, limits, max_prompt_rows, by_priority)


def request_of(
    prompt: list[int] | int,
    max_tokens: int = 4,
    priority: int = 0,
    prompt_logprobs: int | None = None,
    salt: str | None = None,
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
) -> Request:
    """A request; an integer stands for a prompt of so many tokens that nobody else has."""
    name = str(next(_names))
    if isinstance(prompt, int):
        prompt = [1000 * int(name) + i for i in range(prompt)]
    return Request(
        name,
        0,
        prompt,
        SamplingParams(prompt_logprobs=prompt_logprobs, output_kind=output_kind),
        max_tokens,
        priority=priority,
        cache_salt=salt,
    )


def queue(scheduler: Scheduler, *requests: Request) -> list[Request]:
    for request in requests:
        scheduler.add(request)
    return list(requests)


def accept(scheduler: Scheduler, scheduled: ScheduledBatch, token: int = 7) -> list[Request]:
    """What the engine does with a step's rows, with always the same token; those that ended."""
    ended = []
    for part in scheduled.requests:
        request = part.request
        if request.wants_prompt_rows:
            rows = part.num_rows - part.samples
            request.prompt_logprobs += [{0: Logprob(0.0)}] * rows
        if part.samples:
            request.take_token(token)
            if len(request.output_token_ids) >= request.max_tokens:
                scheduler.finish(request, RequestStatus.LENGTH)
                ended.append(request)
    return ended


def tokens_of(scheduled: ScheduledBatch) -> dict[Request, int]:
    return {part.request: part.num_tokens for part in scheduled.requests}


def check(scheduler: Scheduler, scheduled: ScheduledBatch) -> None:
    """What is true of every step."""
    scheduler.pool.check(scheduler.held_blocks())
    assert scheduled.num_tokens <= scheduler.limits.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.limits.max_num_seqs
    prompt_rows = sum(p.num_rows for p in scheduled.requests if p.request.wants_prompt_rows)
    assert prompt_rows <= scheduler.max_extra_rows + len(scheduled.requests)
    slots = [request.slot for request in scheduler.running]
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < scheduler.limits.max_num_seqs for slot in slots)
    assert all(request.slot == -1 and not request.block_ids for request in scheduler.waiting)
    chosen = [part.request for part in scheduled.requests]
    assert len(set(chosen)) == len(chosen)
    writers: dict[int, Request] = {}
    for part in scheduled.requests:
        request = part.request
        assert request in scheduler.running
        assert part.num_tokens >= 1
        assert part.end == request.num_computed_tokens <= request.num_tokens
        # A part that samples has made room for one more token.
        assert part.samples == (part.end == request.num_tokens - part.samples)
        assert len(request.block_ids) == -(-part.end // SIZE)
        for block in request.block_ids[part.start // SIZE :]:
            assert writers.setdefault(block, request) is request, "two write to one block"
    if scheduled.requests:
        limits = (scheduler.limits.max_num_seqs, scheduler.limits.max_num_batched_tokens)
        ladder = bucket_ladder(*limits, scheduler.max_extra_rows, multiple=1)
        assert Bucket.fit(scheduled, ladder).fits(scheduled)


def run(scheduler: Scheduler, max_steps: int = 500) -> list[Request]:
    """Step until nothing is left; requests in the order in which they end."""
    ended = []
    for _ in range(max_steps):
        scheduled = scheduler.schedule()
        check(scheduler, scheduled)
        ended += accept(scheduler, scheduled)
        if not scheduler.has_requests:
            assert scheduler.pool.num_free == scheduler.pool.num_blocks
            return ended
    raise AssertionError("somebody starves")


def test_a_long_prompt_does_not_stall_streams() -> None:
    scheduler = scheduler_of(max_tokens=16, max_mixed=6)
    a, b = queue(scheduler, request_of(3, max_tokens=3), request_of(2, max_tokens=3))
    accept(scheduler, scheduler.schedule())
    long, late = queue(scheduler, request_of(30), request_of(5))
    for _ in range(2):  # the last two tokens of a and b
        scheduled = scheduler.schedule()
        assert tokens_of(scheduled) == {a: 1, b: 1, long: 4}
        accept(scheduler, scheduled)
    assert a.status.finished
    assert b.status.finished
    scheduled = scheduler.schedule()  # nobody generates: the step is as long as it may be
    assert tokens_of(scheduled) == {long: 16}
    accept(scheduler, scheduled)
    assert tokens_of(scheduler.schedule()) == {long: 6, late: 5}


def test_many_streams_leave_half_of_a_mixed_step_to_prompts() -> None:
    scheduler = scheduler_of(max_tokens=16, max_mixed=6, max_num_seqs=8)
    streams = queue(scheduler, *(request_of(1, max_tokens=3) for _ in range(5)))
    accept(scheduler, scheduler.schedule())
    (long,) = queue(scheduler, request_of(30))
    assert tokens_of(scheduler.schedule()) == dict.fromkeys(streams, 1) | {long: 3}


def test_steps_are_full_while_nobody_looks_on() -> None:
    scheduler = scheduler_of(max_tokens=16, max_mixed=6)
    (a,) = queue(scheduler, request_of(3, output_kind=RequestOutputKind.FINAL_ONLY))
    accept(scheduler, scheduler.schedule())
    (long,) = queue(scheduler, request_of(30))
    assert tokens_of(scheduler.schedule()) == {a: 1, long: 15}


def test_steps_are_full_after_the_last_token_of_a_stream() -> None:
    scheduler = scheduler_of(max_tokens=16, max_mixed=6)
    queue(scheduler, request_of(3, max_tokens=1))
    scheduler.schedule()  # its token is drawn, and not yet known
    (long,) = queue(scheduler, request_of(30))
    assert tokens_of(scheduler.schedule()) == {long: 16}


def test_prompts_are_cut_to_the_budget() -> None:
    scheduler = scheduler_of(max_tokens=16)
    a, b = queue(scheduler, request_of(20), request_of(10))
    first = scheduler.schedule()
    assert tokens_of(first) == {a: 16}
    assert [(part.samples, part.num_rows) for part in first.requests] == [(False, 0)]
    accept(scheduler, first)
    second = scheduler.schedule()
    assert tokens_of(second) == {a: 4, b: 10}
    assert [(part.samples, part.num_rows) for part in second.requests] == [(True, 1), (True, 1)]
    accept(scheduler, second)
    assert tokens_of(scheduler.schedule()) == {a: 1, b: 1}


def test_running_requests_come_before_waiting_ones() -> None:
    scheduler = scheduler_of(max_tokens=8)
    (a,) = queue(scheduler, request_of(4, max_tokens=9))
    accept(scheduler, scheduler.schedule())
    (b,) = queue(scheduler, request_of(20))
    assert tokens_of(scheduler.schedule()) == {a: 1, b: 7}


def test_first_come_first_served() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    requests = queue(scheduler, *(request_of(5, priority=-i) for i in range(5)))
    assert run(scheduler) == requests


def test_priorities_and_then_arrival() -> None:
    scheduler = scheduler_of(max_num_seqs=1, by_priority=True)
    a, b, c, d = queue(scheduler, *(request_of(5, priority=p) for p in (3, 1, 3, -1)))
    assert run(scheduler) == [d, b, a, c]


def test_the_last_in_the_order_is_preempted() -> None:
    scheduler = scheduler_of(num_blocks=6, caching=False)
    a, b, c = queue(scheduler, *(request_of(8, max_tokens=8) for _ in range(3)))
    accept(scheduler, scheduler.schedule())  # 16 tokens of a and b: four blocks
    accept(scheduler, scheduler.schedule())  # a and b take a block each, c finds none
    assert scheduler.running == [a, b]
    for _ in range(4):
        accept(scheduler, scheduler.schedule())
    assert scheduler.running == [a]
    assert scheduler.waiting == [b, c]
    assert (a.num_preemptions, b.num_preemptions, b.num_computed_tokens) == (0, 1, 0)
    assert b.output_token_ids  # kept: they are computed again, not drawn again
    assert run(scheduler) == [a, b, c]


def test_low_priority_is_preempted_for_high() -> None:
    scheduler = scheduler_of(num_blocks=5, by_priority=True, caching=False)
    (low,) = queue(scheduler, request_of(8, max_tokens=8, priority=5))
    accept(scheduler, scheduler.schedule())
    (high,) = queue(scheduler, request_of(8, max_tokens=8, priority=1))
    run(scheduler)
    assert low.num_preemptions > 0
    assert high.num_preemptions == 0


def test_nobody_is_taken_in_by_the_step_that_preempts() -> None:
    scheduler = scheduler_of(num_blocks=4, caching=False)
    a, b = queue(scheduler, request_of(8, max_tokens=9), request_of(7, max_tokens=9))
    accept(scheduler, scheduler.schedule())
    (c,) = queue(scheduler, request_of(1))
    for _ in range(12):
        scheduled = scheduler.schedule()
        if b.num_preemptions:
            assert tokens_of(scheduled) == {a: 1}
            assert scheduler.waiting == [b, c]
            return
        accept(scheduler, scheduled)
    raise AssertionError("no preemption")


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = scheduler_of(num_blocks=8)
    (a,) = queue(scheduler, request_of(14, max_tokens=6))
    accept(scheduler, scheduler.schedule())
    scheduler._preempt(a)
    scheduled = scheduler.schedule()
    assert tokens_of(scheduled) == {a: 15 - 12}
    assert a.num_cached_tokens == 12


def test_prefixes_are_shared() -> None:
    scheduler = scheduler_of(max_tokens=64, max_num_seqs=8)
    prompt = list(range(12))
    (a,) = queue(scheduler, request_of([*prompt, 50]))
    accept(scheduler, scheduler.schedule())
    same, shorter, other, salted = queue(
        scheduler,
        request_of([*prompt, 60, 61]),
        request_of(prompt),
        request_of([9, *prompt[1:]]),
        request_of(prompt, salt="tenant"),
    )
    scheduled = tokens_of(scheduler.schedule())
    assert scheduled[same] == 2
    assert scheduled[shorter] == 4  # the last token is computed for its logits, with its block
    assert scheduled[other] == scheduled[salted] == 12
    assert same.block_ids[:3] == a.block_ids[:3]
    assert same.num_cached_tokens == 12
    scheduler.pool.check(scheduler.held_blocks())


def test_requests_of_one_step_share() -> None:
    scheduler = scheduler_of()
    a, b = queue(scheduler, request_of(list(range(9))), request_of(list(range(9))))
    assert tokens_of(scheduler.schedule()) == {a: 9, b: 1}
    assert a.block_ids[:2] == b.block_ids[:2]
    assert a.block_ids[2] != b.block_ids[2]


def test_what_failed_is_not_found() -> None:
    scheduler = scheduler_of()
    (a,) = queue(scheduler, request_of(list(range(12))))
    scheduler.schedule()
    scheduler.finish(a, RequestStatus.FAILED)
    (b,) = queue(scheduler, request_of(list(range(12))))
    assert tokens_of(scheduler.schedule()) == {b: 12}


def test_what_was_aborted_is_found() -> None:
    scheduler = scheduler_of()
    (a,) = queue(scheduler, request_of(list(range(12))))
    scheduler.schedule()
    scheduler.finish(a, RequestStatus.ABORTED)
    (b,) = queue(scheduler, request_of(list(range(12))))
    assert tokens_of(scheduler.schedule()) == {b: 4}


def test_rows_of_prompt_logprobs_have_a_budget() -> None:
    scheduler = scheduler_of(max_tokens=16, max_prompt_rows=8)
    a, b, c = queue(
        scheduler,
        request_of(20, prompt_logprobs=0),
        request_of(3, prompt_logprobs=0),
        request_of(2),
    )
    seen = []
    while scheduler.has_requests:
        scheduled = scheduler.schedule()
        check(scheduler, scheduled)
        seen.append([(part.request, part.num_tokens, part.num_rows) for part in scheduled.requests])
        accept(scheduler, scheduled)
    # Eight rows a step; those behind wait until there are rows, and are not overtaken.
    assert seen[:3] == [[(a, 8, 8)], [(a, 8, 8)], [(a, 4, 4), (b, 3, 3), (c, 2, 1)]]
    assert len(a.prompt_logprobs) == 20
    assert len(b.prompt_logprobs) == 3


def test_prompt_logprobs_are_not_taken_twice_after_a_preemption() -> None:
    scheduler = scheduler_of(max_prompt_rows=8)
    (a,) = queue(scheduler, request_of(20, prompt_logprobs=0))
    accept(scheduler, scheduler.schedule())
    scheduler._preempt(a)
    while not a.status.finished:
        scheduled = scheduler.schedule()
        check(scheduler, scheduled)
        accept(scheduler, scheduled)
    assert len(a.prompt_logprobs) == 20


def test_ends_may_come_at_any_time_and_twice() -> None:
    scheduler = scheduler_of()
    a, b = queue(scheduler, request_of(5), request_of(5))
    scheduler.finish(b, RequestStatus.ABORTED)
    scheduler.schedule()
    for status in (RequestStatus.LENGTH, RequestStatus.ABORTED):
        scheduler.finish(a, status)
    assert (a.status, b.status) == (RequestStatus.LENGTH, RequestStatus.ABORTED)
    assert not scheduler.has_requests
    assert scheduler.pool.num_free == 32


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step of its arrival
        st.integers(0, 2),  # whose beginning it has
        st.integers(0, 16),  # how much of it
        st.integers(1, 12),  # tokens of its own
        st.integers(1, 9),  # answer
        st.integers(-2, 2),  # priority
        st.sampled_from([None, None, None, 0]),  # prompt_logprobs
        st.none() | st.integers(0, 20),  # the step of its abort
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=ARRIVALS,
    num_blocks=st.integers(10, 24),
    max_num_seqs=st.integers(1, 5),
    max_tokens=st.integers(1, 20),
    by_priority=st.booleans(),
    caching=st.booleans(),
    max_mixed=st.integers(1, 20),
)
def test_any_storm(
    arrivals: list[tuple],
    num_blocks: int,
    max_num_seqs: int,
    max_tokens: int,
    by_priority: bool,
    caching: bool,
    max_mixed: int,
) -> None:
    """Nobody starves, budgets hold, and at the end no block is missing."""
    rows = min(6, max_tokens)
    scheduler = scheduler_of(
        num_blocks,
        max_num_seqs,
        max_tokens,
        rows,
        by_priority,
        caching,
        min(max_mixed, max_tokens),
    )
    coming = []
    for step, which, shared, own, answer, priority, prompt_logprobs, aborted in arrivals:
        prompt = [100 * which + i for i in range(shared)] + [5000 + own] * own
        coming.append((step, request_of(prompt, answer, priority, prompt_logprobs), aborted))
    aborts = {request: at for _, request, at in coming if at is not None}
    everybody = [request for _, request, _ in coming]
    step = 0
    while coming or scheduler.has_requests:
        for arrival in [arrival for arrival in coming if arrival[0] <= step]:
            coming.remove(arrival)
            scheduler.add(arrival[1])
        for request, at in aborts.items():
            if at == step and request in scheduler._order:
                scheduler.finish(request, RequestStatus.ABORTED)
        first = (scheduler.running + scheduler.waiting)[:1]
        scheduled = scheduler.schedule()
        check(scheduler, scheduled)
        # The first in the order gets on with every step, so nobody waits for ever.
        assert [part.request for part in scheduled.requests[:1]] == first
        accept(scheduler, scheduled)
        step += 1
        assert step < 600, "somebody starves"
    assert all(request.status.finished for request in everybody)
    for request in everybody:
        if request.status is RequestStatus.LENGTH and request.params.prompt_logprobs is not None:
            assert len(request.prompt_logprobs) == request.num_prompt_tokens
    assert scheduler.pool.num_free == num_blocks
    assert sorted(scheduler._free_slots) == list(range(max_num_seqs))


@pytest.mark.parametrize(
    ("seqs", "tokens", "rows", "multiple"), [(1, 1, 1, 1), (3, 100, 7, 1), (5, 8, 8, 4)]
)
def test_the_ladder_has_a_bucket_for_the_largest_steps(
    seqs: int, tokens: int, rows: int, multiple: int
) -> None:
    ladder = bucket_ladder(seqs, tokens, rows, multiple)
    assert list(ladder) == sorted(set(ladder))
    assert all(bucket.num_tokens % multiple == 0 for bucket in ladder)
    assert any(b.num_tokens >= tokens and b.num_rows >= rows + seqs for b in ladder)
    assert any(b.num_tokens >= seqs and b.max_query_len == 1 for b in ladder)


@pytest.mark.parametrize(
    ("drafted", "num_seqs", "max_query_len"),
    [
        ([0] * 12, 16, 1),
        ([15], 1, 16),
        ([7, 7], 15, 16),
        ([15, 15], 2, 16),
        ([0] * 14 + [1], 15, 16),
    ],
)
def test_shapes_for_drafts_are_for_drafts(
    drafted: list[int], num_seqs: int, max_query_len: int
) -> None:
    parts = [
        ScheduledRequest(request_of(8), 7, 1 + k, 1 + k, samples=True, num_drafted=k)
        for k in drafted
    ]
    ladder = bucket_ladder(32, 256, 64, multiple=1, max_draft_len=15)
    bucket = Bucket.fit(ScheduledBatch(tuple(parts)), ladder)
    assert (bucket.num_seqs, bucket.max_query_len) == (num_seqs, max_query_len)


@pytest.mark.parametrize("longest", [1, 2, 3, 15])
def test_steps_have_room_for_the_least_number_of_sequences(longest: int) -> None:
    ladder = bucket_ladder(1, 256, 15, 1, max_draft_len=longest, drafts_on_device=True, least=2)
    assert min(bucket.num_seqs for bucket in ladder) == 2
    part = ScheduledRequest(
        request_of(8), 7, 1 + longest, 1 + longest, samples=True, num_drafted=longest
    )
    assert Bucket.fit(ScheduledBatch((part,)), ladder).num_tokens <= max(1 + longest, 3)
    plain = ScheduledRequest(request_of(8), 7, 1, 1, samples=True)
    assert Bucket.fit(ScheduledBatch((plain,)), ladder).num_tokens == 2
