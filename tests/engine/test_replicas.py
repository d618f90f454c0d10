"""Several engines behind the interface of one."""

from concurrent.futures import Future, wait

import jax
import numpy as np
import plain_model
import pytest
from tiny_engine import CONFIG, GREEDY, make_files, make_tensors, options_of, run

from arctic_jax.config import EngineConfig
from arctic_jax.engine import replicas
from arctic_jax.engine.replicas import ReplicatedEngine
from arctic_jax.errors import InvalidRequestError
from arctic_jax.request import RequestOutput, SamplingParams

TENSORS = make_tensors()
RANDOM = np.random.default_rng(0)
PROMPTS = [[int(t) for t in RANDOM.integers(0, 97, length)] for length in (3, 40, 7, 21, 2, 30)]


def replicated(monkeypatch: pytest.MonkeyPatch, **options: int) -> ReplicatedEngine:
    monkeypatch.setattr(replicas, "open_model", lambda *_: make_files(CONFIG, TENSORS))
    return ReplicatedEngine(EngineConfig.from_keywords(**options_of(**options)))


@pytest.mark.parametrize(("dp", "tp", "sp"), [(2, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_the_same_tokens(monkeypatch: pytest.MonkeyPatch, dp: int, tp: int, sp: int) -> None:
    engine = replicated(
        monkeypatch,
        data_parallel_size=dp,
        tensor_parallel_size=tp,
        ulysses_sequence_parallel_size=sp,
        shift_parallel_threshold=4,
    )
    used = [set(e.runner.mesh.devices.flat) for e in engine.engines]
    assert used[0].isdisjoint(used[1])
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, GREEDY)
    assert [e.scheduler.num_requests for e in engine.engines] == [3, 3]
    done = run(engine)
    engine.check()
    for i, prompt in enumerate(PROMPTS):
        tokens = plain_model.greedy(CONFIG, TENSORS, prompt, GREEDY.max_tokens)
        assert done[str(i)].outputs[0].token_ids == tokens
    assert all(log.totals for log in engine.step_logs)


def test_the_least_loaded_gets_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replicated(monkeypatch, data_parallel_size=2)
    first, second = engine.engines
    engine.add_request("a", [1], GREEDY)
    engine.add_request("b", [2], GREEDY)
    assert (first.scheduler.num_requests, second.scheduler.num_requests) == (1, 1)
    with pytest.raises(InvalidRequestError, match="'b' is already in use"):
        engine.add_request("b", [2], GREEDY)
    assert engine.abort("b").outputs[0].finish_reason == "abort"
    assert engine.abort("b") is None
    engine.add_request("c", [3], GREEDY)
    assert (first.scheduler.num_requests, second.scheduler.num_requests) == (1, 1)
    assert set(run(engine)) == {"a", "c"}
    engine.add_request("b", [2], GREEDY)  # the id is free again
    assert set(run(engine)) == {"b"}
    assert not engine.has_requests


def test_what_a_replica_has_ended_meanwhile_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replicated(monkeypatch, data_parallel_size=2)
    engine.add_request("a", [1], GREEDY)
    engine.add_request("b", [2], GREEDY)
    done = set()
    while engine.has_requests:
        done |= {output.request_id for output in engine.step() if output.finished}
        wait(engine._stepping.values())  # all are ready before anybody asks again
    assert done == {"a", "b"}


def test_an_error_does_not_take_what_others_have_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replicated(monkeypatch, data_parallel_size=2)
    engine.add_request("a", [1], GREEDY)
    aborted = engine.abort("a")
    assert aborted is not None
    failed: Future[list[RequestOutput]] = Future()
    failed.set_exception(RuntimeError("no device"))
    fine: Future[list[RequestOutput]] = Future()
    fine.set_result([aborted])
    engine._stepping = {0: failed, 1: fine}
    assert engine.step() == [aborted]
    assert engine.has_requests
    with pytest.raises(RuntimeError, match="no device"):
        engine.step()
    assert not engine.has_requests


def test_replicas_draw_different_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replicated(monkeypatch, data_parallel_size=2)
    params = SamplingParams(temperature=2.0, max_tokens=8)
    for name in "ab":
        engine.add_request(name, [1, 2], params)
    done = run(engine)
    assert done["a"].outputs[0].token_ids != done["b"].outputs[0].token_ids


def test_too_few_devices_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    count = jax.device_count()
    with pytest.raises(ValueError, match=f"need {count + 1}, there are {count}"):
        replicated(monkeypatch, data_parallel_size=count + 1)
