"""Steps of several rounds: the same answers, however many tokens a step draws."""

import dataclasses

import jax
import pytest
from hypothesis import given
from schedule_cases import BEGINNINGS, REQUESTS, SCHEDULES, check_any_schedule, expected, greedy
from tiny_engine import check_caches_are_updated_in_place, make_engine, run

from arctic_jax.engine import rounds
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.runner import LaunchedStep, ModelRunner
from arctic_jax.request import RequestOutput, SamplingParams
from arctic_jax.scheduled_batch import ScheduledBatch


@pytest.fixture(scope="module")
def engine() -> EngineCore:
    return make_engine(num_scheduler_steps=4)


@pytest.fixture(scope="module")
def cramped_engine() -> EngineCore:
    return make_engine(num_scheduler_steps=3, num_blocks=26)


@pytest.fixture(scope="module")
def one_by_one() -> EngineCore:
    return make_engine(num_scheduler_steps=1)


def test_caches_are_updated_in_place(engine: EngineCore) -> None:
    check_caches_are_updated_in_place(engine)


@SCHEDULES
@given(REQUESTS)
def test_any_schedule(engine: EngineCore, requests: list) -> None:
    check_any_schedule(engine, requests)


@SCHEDULES
@given(REQUESTS)
def test_any_schedule_under_preemption(cramped_engine: EngineCore, requests: list) -> None:
    check_any_schedule(cramped_engine, requests)


def test_a_step_draws_several_tokens(engine: EngineCore) -> None:
    before = engine.num_steps
    engine.add_request("a", [1, 2, 3], greedy(41))
    lengths = [len(o.outputs[0].token_ids) for o in outputs_of(engine)]
    assert lengths == [1, *range(5, 42, 4)]
    assert engine.num_steps - before == 12  # 11 were launched, the last is read by one more


def outputs_of(engine: EngineCore) -> list[RequestOutput]:
    outputs = []
    while engine.has_requests:
        outputs += engine.step()
    return outputs


SAMPLING = [
    {"temperature": 0.9, "seed": 3, "logprobs": 2},
    {"temperature": 0.7, "seed": 4, "top_p": 0.8, "frequency_penalty": 0.9, "logprobs": 0},
    {"temperature": 0, "repetition_penalty": 1.4, "presence_penalty": 0.5},
    {"temperature": 1.2, "seed": 5, "top_k": 9, "min_p": 0.02, "logit_bias": {5: 3.0, 7: -9.0}},
    {"temperature": 0.8, "seed": 6, "stop_token_ids": list(range(20, 40))},
]


def test_sampled_answers_are_those_of_single_rounds(
    engine: EngineCore, one_by_one: EngineCore
) -> None:
    def answers(engine: EngineCore) -> dict[str, RequestOutput]:
        for i, sampling in enumerate(SAMPLING):
            params = SamplingParams(max_tokens=17 + i, ignore_eos=True, **sampling)
            engine.add_request(str(i), BEGINNINGS[i % 3][: 4 + i], params)
        return run(engine)

    several, single = answers(engine), answers(one_by_one)
    for name, output in single.items():
        ours, theirs = several[name].outputs[0], output.outputs[0]
        assert ours.token_ids == theirs.token_ids
        assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
        if theirs.logprobs is not None:
            for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert mine.keys() == other.keys()
                for token, entry in other.items():
                    assert mine[token].logprob == pytest.approx(entry.logprob, abs=1e-5)
                    assert mine[token].rank == entry.rank
    engine.check()


def test_an_end_within_a_step_shows_nothing_after_it(engine: EngineCore) -> None:
    tokens = expected([9, 8, 7], 20)
    for end in range(1, 12):
        if tokens[end] in tokens[:end]:
            continue
        params = dataclasses.replace(greedy(20), stop_token_ids=[tokens[end]])
        engine.add_request("a", [9, 8, 7], params)
        answer = run(engine)["a"].outputs[0]
        assert answer.token_ids == tokens[: end + 1]
        assert answer.stop_reason == tokens[end]
    engine.check()


@pytest.mark.parametrize("wants", [{"min_tokens": 12}, {"bad_words": ["q"]}])
def test_single_rounds_while_somebody_needs_the_host(
    engine: EngineCore, monkeypatch: pytest.MonkeyPatch, wants: dict
) -> None:
    launched = []

    def launch(scheduled: ScheduledBatch) -> LaunchedStep:
        names = {part.request.request_id for part in scheduled.requests}
        launched.append(("needs" in names, scheduled.num_rounds))
        return ModelRunner.launch(engine.runner, scheduled)

    monkeypatch.setattr(engine.runner, "launch", launch)
    engine.add_request("needs", [1, 2, 3], dataclasses.replace(greedy(12), **wants))
    engine.add_request("plain", [1, 2, 3], greedy(60))
    assert run(engine)["plain"].outputs[0].token_ids == expected([1, 2, 3], 60)
    assert {count for needs, count in launched if needs} == {1}
    assert launched[-1] == (False, 4)


def test_who_arrives_is_taken_in_by_the_next_step(engine: EngineCore) -> None:
    engine.add_request("first", [1, 2, 3], greedy(60))
    for _ in range(3):
        engine.step()
    engine.add_request("second", [4, 5, 6], greedy(5))
    engine.step()
    assert {r.request_id for r in engine.scheduler.running} == {"first", "second"}
    done = run(engine)
    assert done["first"].outputs[0].token_ids == expected([1, 2, 3], 60)
    assert done["second"].outputs[0].token_ids == expected([4, 5, 6], 5)


@pytest.mark.parametrize(("tp", "sp"), [(2, 1), (1, 2), (2, 2)])
def test_several_devices(tp: int, sp: int) -> None:
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    engine = make_engine(
        num_scheduler_steps=4, tensor_parallel_size=tp, ulysses_sequence_parallel_size=sp
    )
    for i in range(3):
        engine.add_request(str(i), BEGINNINGS[i], greedy(9 + i))
    done = run(engine)
    for i in range(3):
        assert done[str(i)].outputs[0].token_ids == expected(BEGINNINGS[i], 9 + i)


def test_not_where_the_host_makes_drafts() -> None:
    with pytest.raises(ValueError, match=r"num_scheduler_steps must be 1 .* got 4"):
        make_engine(num_scheduler_steps=4, speculative_config={"method": "ngram"})


@pytest.mark.parametrize(
    ("num_parameters", "num_layers", "several"),
    [(135e6, 30, True), (0.6e9, 28, True), (1.7e9, 24, False), (8e9, 32, False)],
)
def test_small_models_are_slower_to_launch_than_to_read(
    num_parameters: float, num_layers: int, several: bool
) -> None:
    assert (rounds.by_default(2 * int(num_parameters), num_layers) > 1) == several
