"""The engine behind an event loop: many at once, leaving early, failing, ending."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from tiny_engine import make_engine, run

from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.output_processor import join_deltas
from arctic_jax.errors import EngineDeadError, InvalidRequestError
from arctic_jax.request import RequestOutput, RequestOutputKind, SamplingParams
from arctic_jax.serving import async_engine
from arctic_jax.serving.async_engine import AsyncEngine

TIMEOUT = 60.0


@pytest.fixture(scope="module")
def core() -> EngineCore:
    """One engine, which the tests put behind one `AsyncEngine` after the other."""
    return make_engine(max_num_seqs=3)


@pytest.fixture
def engine(core: EngineCore) -> Iterator[AsyncEngine]:
    serving = AsyncEngine(engine=core)
    yield serving
    serving.shutdown()
    check_nothing_is_left(core)


def check_nothing_is_left(core: EngineCore) -> None:
    core.check()
    assert not core.has_requests
    assert not core._groups
    assert core.scheduler.pool.num_free == core.scheduler.pool.num_blocks


def finish[T](task: Coroutine[Any, Any, T]) -> T:
    """Run to the end, but not for ever."""
    return asyncio.run(asyncio.wait_for(task, TIMEOUT))


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


async def last_of(
    engine: AsyncEngine, prompt: Any, params: SamplingParams, request_id: str | None = None
) -> RequestOutput:
    return [output async for output in engine.generate(prompt, params, request_id)][-1]


async def until_idle(engine: AsyncEngine) -> None:
    """Wait until the engine's thread has seen what was asked of it, and has nothing to do."""
    while True:
        await engine.check_health()
        if not engine.engine.has_requests:
            return


def test_many_at_once_are_each_alone(engine: AsyncEngine, core: EngineCore) -> None:
    prompts = [[i] * (1 + 3 * i) for i in range(20)]
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=1 + i, n=1 + i % 2, logprobs=i % 3)
        for i in range(20)
    ]

    async def all_of_them() -> list[RequestOutput]:
        jobs = [last_of(engine, p, one) for p, one in zip(prompts, params, strict=True)]
        return await asyncio.gather(*jobs)

    outputs = finish(all_of_them())
    engine.shutdown()  # from here on the engine is ours
    for i, output in enumerate(outputs):
        core.add_request("alone", prompts[i], params[i])
        alone = run(core)["alone"]
        assert output.finished
        assert output.prompt_token_ids == prompts[i]
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in alone.outputs]
        assert [o.text for o in output.outputs] == [o.text for o in alone.outputs]


def test_the_wait_for_a_step_is_part_of_the_latency(engine: AsyncEngine) -> None:
    """A request that comes during a step has arrived then, not when the step is over."""
    begun, ended = threading.Event(), threading.Event()

    def step() -> None:
        begun.set()
        ended.wait(TIMEOUT)

    async def arrive() -> tuple[float, RequestOutput]:
        stepping = asyncio.create_task(engine._call(step))
        await asyncio.to_thread(begun.wait, TIMEOUT)
        waiting = asyncio.create_task(last_of(engine, [1, 2], greedy(2)))
        while engine._inbox.empty():
            await asyncio.sleep(0.001)
        end = time.monotonic()
        ended.set()
        await stepping
        return end, await waiting

    end, output = finish(arrive())
    assert output.metrics.arrival_time < end <= output.metrics.first_scheduled_time


def test_states_grow(engine: AsyncEngine) -> None:
    async def states() -> list[RequestOutput]:
        return [output async for output in engine.generate("<1> <2>", greedy(12), "mine")]

    seen = finish(states())
    lengths = [len(state.outputs[0].token_ids) for state in seen]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == 12
    assert [state.finished for state in seen] == [False] * (len(seen) - 1) + [True]
    assert {state.request_id for state in seen} == {"mine"}
    assert seen[0].prompt == "<1> <2>"


def test_a_slow_reader_misses_states_but_not_the_end(engine: AsyncEngine) -> None:
    async def slow() -> list[int]:
        lengths = []
        async for output in engine.generate([1, 2], greedy(30)):
            lengths.append(len(output.outputs[0].token_ids))
            await until_idle(engine)
        return lengths

    lengths = finish(slow())
    assert len(lengths) <= 3
    assert lengths[-1] == 30


@pytest.mark.parametrize("letters", [3, 64])
def test_a_slow_reader_of_deltas_misses_nothing(
    engine: AsyncEngine, letters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it is put together, so that it is never many pieces."""
    monkeypatch.setattr(async_engine, "_MOST_LETTERS", letters)
    params = dataclasses.replace(greedy(30), logprobs=2)
    deltas = dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)
    waiting = []
    put = async_engine._Mailbox.put

    def counted(mailbox: async_engine._Mailbox, item: RequestOutput | BaseException) -> None:
        put(mailbox, item)
        waiting.append(len(mailbox._letters))

    monkeypatch.setattr(async_engine._Mailbox, "put", counted)

    async def slow() -> list[RequestOutput]:
        found = []
        async for output in engine.generate([1, 2], deltas):
            found.append(output)
            await until_idle(engine)
        return found

    found = finish(slow())
    assert len(found) <= 3
    assert len(waiting) > 20
    assert 1 < max(waiting) <= letters
    whole = finish(last_of(engine, [1, 2], params)).outputs
    assert join_deltas(found).outputs == whole


def test_a_slow_reader_slows_nobody(engine: AsyncEngine) -> None:
    async def both() -> None:
        slow = engine.generate([1], greedy(30))
        await anext(slow)
        assert len((await last_of(engine, [2], greedy(20))).outputs[0].token_ids) == 20
        await slow.aclose()  # pyright: ignore[reportAttributeAccessIssue]

    finish(both())


def test_aborting_ends_the_iterator(engine: AsyncEngine) -> None:
    async def aborted() -> RequestOutput:
        output = None
        async for output in engine.generate([1, 2, 3], greedy(80), "mine"):
            if not output.finished:
                await engine.abort("mine")
        assert output is not None
        return output

    output = finish(aborted())
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert 0 < len(output.outputs[0].token_ids) < 80


def test_aborting_what_waits(engine: AsyncEngine) -> None:
    async def abort_the_last() -> RequestOutput:
        crowd = [asyncio.create_task(last_of(engine, [i], greedy(60))) for i in range(5)]
        await asyncio.sleep(0)
        last = asyncio.create_task(last_of(engine, [9], greedy(60), "last"))
        while not last.done():
            await engine.abort("last")
            await asyncio.sleep(0.001)
        for output in await asyncio.gather(*crowd):
            assert len(output.outputs[0].token_ids) == 60
        return await last

    assert finish(abort_the_last()).outputs[0].finish_reason == "abort"


def test_aborting_an_unknown_request_is_ignored(engine: AsyncEngine) -> None:
    finish(engine.abort("nobody"))


def test_leaving_the_iterator_aborts(engine: AsyncEngine) -> None:
    async def leave() -> None:
        stream = engine.generate([1, 2, 3], greedy(80))
        async for _ in stream:
            break
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
        started = time.monotonic()
        await until_idle(engine)
        assert time.monotonic() - started < 5
        await engine.check_health()

    finish(leave())
    check_nothing_is_left(engine.engine)


@pytest.mark.parametrize("yields", range(8))
def test_cancelling_at_any_moment_leaves_nothing(engine: AsyncEngine, yields: int) -> None:
    """Also while the request is on its way to the engine's thread."""

    async def cancelled() -> None:
        task = asyncio.create_task(last_of(engine, [1, 2, 3], greedy(90), "mine"))
        for _ in range(yields):
            await asyncio.sleep(0.0005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.check_health()
        await engine.check_health()
        assert not engine.engine.has_requests
        assert not engine._mailboxes

    finish(cancelled())


def test_a_request_cancelled_on_its_way_is_taken_back(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_request = engine.engine.add_request

    def slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        add_request(*arguments)

    async def cancelled() -> None:
        task = asyncio.create_task(last_of(engine, [1, 2, 3], greedy(90)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.check_health()
        assert not engine.engine.has_requests

    monkeypatch.setattr(engine.engine, "add_request", slowly)
    finish(cancelled())


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "the prompt must not be empty"),
    ("", {}, "the prompt must not be empty"),
    ([97], {}, "token id 97"),
    ([1] * 96, {}, "maximum context length is 96"),
    ("\ud800", {}, "cannot be encoded"),
    (None, {}, "a prompt is text"),
    ({"prompt": "<1>", "cache_salt": 7}, {}, "cache_salt must be a non-empty string"),
    ([1], {"stop_token_ids": [97]}, "stop_token_ids is not a token id"),
]


@pytest.mark.parametrize(("prompt", "params", "message"), BAD)
def test_bad_requests_are_refused_and_the_next_is_served(
    engine: AsyncEngine, prompt: Any, params: dict[str, Any], message: str
) -> None:
    async def bad_and_good() -> RequestOutput:
        with pytest.raises(InvalidRequestError, match=message):
            await last_of(engine, prompt, dataclasses.replace(greedy(), **params))
        return await last_of(engine, [1, 2], greedy(3))

    assert len(finish(bad_and_good()).outputs[0].token_ids) == 3


def test_an_id_in_use_is_refused_and_its_owner_goes_on(engine: AsyncEngine) -> None:
    async def twice() -> RequestOutput:
        first = engine.generate([1, 2], greedy(40), "same")
        await anext(first)
        with pytest.raises(InvalidRequestError, match="request_id 'same' is already in use"):
            await last_of(engine, [3], greedy(), "same")
        return [output async for output in first][-1]

    output = finish(twice())
    assert len(output.outputs[0].token_ids) == 40
    assert output.outputs[0].finish_reason == "length"


def test_leaving_late_does_not_abort_the_next_owner_of_the_id(engine: AsyncEngine) -> None:
    async def two_owners() -> RequestOutput:
        first = engine.generate([1], greedy(3), "same")
        async for output in first:
            if output.finished:
                break
        second = engine.generate([2], greedy(40), "same")
        await anext(second)
        await first.aclose()  # pyright: ignore[reportAttributeAccessIssue]
        return [output async for output in second][-1]

    assert finish(two_owners()).outputs[0].finish_reason == "length"


def test_requests_from_several_event_loops(engine: AsyncEngine) -> None:
    for _ in range(3):
        output = finish(last_of(engine, [1, 2], greedy(3)))
        assert len(output.outputs[0].token_ids) == 3


def test_an_event_loop_that_ends_without_goodbye_harms_nobody(engine: AsyncEngine) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.generate([1], greedy(60), "left behind")
    loop.run_until_complete(anext(stream))  # pyright: ignore[reportArgumentType]
    loop.close()
    assert len(finish(last_of(engine, [2], greedy(20))).outputs[0].token_ids) == 20
    finish(engine.abort("left behind"))
    # Nobody can close it any more in the loop that it belongs to.
    with pytest.raises(StopIteration):
        stream.aclose().send(None)  # pyright: ignore[reportAttributeAccessIssue]


def test_health(engine: AsyncEngine) -> None:
    finish(engine.check_health())
    engine.shutdown()
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        finish(engine.check_health())
    engine.shutdown()  # a second time: nothing happens


def dying_engine(monkeypatch: pytest.MonkeyPatch, core: EngineCore, after: int) -> AsyncEngine:
    """An engine that fails in the step after so many."""
    step, count = core.step, 0

    def fail() -> list[RequestOutput]:
        nonlocal count
        count += 1
        if count > after:
            raise MemoryError("out of memory")
        return step()

    monkeypatch.setattr(core, "step", fail)
    return AsyncEngine(engine=core)


def abort_all(core: EngineCore) -> None:
    for request_id in list(core._groups):
        core.abort(request_id)
    check_nothing_is_left(core)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_engine_tells_everybody(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def everybody(engine: AsyncEngine) -> list[Any]:
        jobs = [last_of(engine, [i], greedy(80)) for i in range(6)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        started = time.monotonic()
        for later in (
            last_of(engine, [1], greedy()),
            engine.check_health(),
            engine.abort("x"),
        ):
            with pytest.raises(EngineDeadError, match="out of memory"):
                await later
        assert time.monotonic() - started < 0.5
        return results

    engine = dying_engine(monkeypatch, core, after=10)
    results = finish(everybody(engine))
    assert [str(result) for result in results] == ["out of memory"] * 6
    assert all(isinstance(result, EngineDeadError) for result in results)
    assert all(isinstance(result.__cause__, MemoryError) for result in results)
    assert "the engine has failed" in caplog.text
    engine.shutdown()
    abort_all(core)


def test_shutting_down_tells_everybody(core: EngineCore) -> None:
    engine = AsyncEngine(engine=core)

    async def everybody() -> list[Any]:
        jobs = [asyncio.create_task(last_of(engine, [i], greedy(90))) for i in range(6)]
        await engine.check_health()
        await engine.check_health()
        await asyncio.to_thread(engine.shutdown)
        started = time.monotonic()
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert time.monotonic() - started < 3
        return results

    results = finish(everybody())
    assert all(isinstance(result, EngineDeadError) for result in results)
    assert {str(result) for result in results} == {"the engine was shut down"}
    abort_all(core)


def test_calls_on_their_way_to_a_dying_engine_are_answered(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = dying_engine(monkeypatch, core, after=0)

    async def everybody() -> list[Any]:
        jobs: list[Any] = [last_of(engine, [1], greedy())]
        jobs += [engine.check_health() for _ in range(20)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    started = time.monotonic()
    results = finish(everybody())
    assert isinstance(results[0], EngineDeadError)
    assert all(result is None or isinstance(result, EngineDeadError) for result in results)
    assert time.monotonic() - started < 3
    abort_all(core)
