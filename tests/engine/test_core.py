"""The engine against the plain model, for any schedule; and what it does with bad requests."""

import jax
import numpy as np
import plain_model
import pytest
from hypothesis import given
from schedule_cases import (
    BEGINNINGS,
    REQUESTS,
    SCHEDULES,
    TENSORS,
    check_any_schedule,
    expected,
    greedy,
)
from tiny_engine import CONFIG, check_caches_are_updated_in_place, make_engine, run

from arctic_jax.engine.core import EngineCore
from arctic_jax.errors import InvalidRequestError
from arctic_jax.request import SamplingParams


@pytest.fixture(scope="module")
def engine() -> EngineCore:
    return make_engine()


@pytest.fixture(scope="module")
def cramped_engine() -> EngineCore:
    """So few blocks that requests preempt each other all the time."""
    return make_engine(num_blocks=26)


def test_caches_are_updated_in_place(engine: EngineCore) -> None:
    check_caches_are_updated_in_place(engine)


def test_logits_are_those_of_the_plain_model(engine: EngineCore) -> None:
    prompt = [int(t) for t in np.random.default_rng(1).integers(0, 97, 40)]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, prompt_logprobs=5)
    engine.add_request("a", prompt, params)
    output = run(engine)["a"]
    logits = plain_model.logits(CONFIG, TENSORS, prompt)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for token, entry in output.outputs[0].logprobs[0].items():
        assert entry.logprob == pytest.approx(logprobs[-1, token], abs=1e-4)
    assert output.prompt_logprobs[0] is None
    for i, entries in enumerate(output.prompt_logprobs[1:]):
        best = logprobs[i].argmax()
        assert entries[best].rank == 1
        assert prompt[i + 1] in entries
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(logprobs[i, token], abs=1e-4)


@SCHEDULES
@given(REQUESTS)
def test_any_schedule(engine: EngineCore, requests: list) -> None:
    check_any_schedule(engine, requests)


@SCHEDULES
@given(REQUESTS)
def test_any_schedule_under_preemption(cramped_engine: EngineCore, requests: list) -> None:
    check_any_schedule(cramped_engine, requests)


def test_the_cramped_engine_does_preempt(cramped_engine: EngineCore) -> None:
    for i in range(4):
        cramped_engine.add_request(str(i), [i] * 24, greedy(12))
    done = run(cramped_engine)
    assert sum(o.metrics.num_preemptions for o in done.values()) > 0
    for i in range(4):
        assert done[str(i)].outputs[0].token_ids == expected([i] * 24, 12)


SMALLER_MESHES = [(2, 1), (1, 2), (2, 2), (1, 4), (8, 1)]


@pytest.mark.parametrize(
    ("tp", "sp"),
    [
        (4, 1),
        (1, 8),
        (4, 2),
        *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in SMALLER_MESHES),
    ],
)
def test_any_mesh_gives_the_same_tokens(tp: int, sp: int) -> None:
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    engine = make_engine(tensor_parallel_size=tp, ulysses_sequence_parallel_size=sp)
    prompts = [BEGINNINGS[0][:n] for n in (1, 5, 24)] + [BEGINNINGS[1] * 2]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(6))
    done = run(engine)
    for i, prompt in enumerate(prompts):
        assert done[str(i)].outputs[0].token_ids == expected(prompt, 6)


def test_heads_that_cannot_be_split_are_refused() -> None:
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices")
    config = CONFIG | {"num_attention_heads": 6, "num_key_value_heads": 2}
    with pytest.raises(ValueError, match=r"6 attention heads with 2 key/value heads .* 4 devices"):
        make_engine(config, {}, tensor_parallel_size=4)


def test_nothing_is_compiled_after_ready(engine: EngineCore) -> None:
    with jax.log_compiles(False), _counting_compilations() as count:
        for i, length in enumerate((1, 3, 9, 31, 33, 70)):
            params = SamplingParams(
                temperature=i % 2,
                max_tokens=5,
                logprobs=i,
                prompt_logprobs=2 * (i % 2) or None,
                repetition_penalty=1 + i / 10,
                min_tokens=i % 3,
            )
            engine.add_request(str(i), [i] * length, params)
        run(engine)
    assert count == []


class _counting_compilations:
    """Collects JAX's compilation events while it is entered."""

    def __enter__(self) -> list[str]:
        self.events: list[str] = []
        self.listening = True

        def listen(event: str, duration_secs: float, **kwargs: object) -> None:
            if self.listening and "backend_compile" in event:
                self.events.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        return self.events

    def __exit__(self, *_: object) -> None:
        self.listening = False


def test_prefix_cache_is_used_and_salted(engine: EngineCore) -> None:
    prompt = [int(t) for t in np.random.default_rng(9).integers(0, 97, 30)]
    cached = []
    for name, salt in (("a", None), ("b", None), ("c", "tenant"), ("d", "tenant")):
        engine.add_request(name, prompt, greedy(4), cache_salt=salt)
        output = run(engine)[name]
        assert output.outputs[0].token_ids == expected(prompt, 4)
        cached.append(output.num_cached_tokens)
    assert cached == [0, 28, 0, 28]


def test_requests_of_one_step_share_their_prefix(engine: EngineCore) -> None:
    prompt = [int(t) for t in np.random.default_rng(10).integers(0, 97, 20)]
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=3)
    engine.add_request("a", prompt, params)
    engine.step()
    blocks = [r.block_ids[:4] for r in engine.scheduler.running]
    assert len(blocks) == 3
    assert all(b == blocks[0] for b in blocks)
    assert len(run(engine)["a"].outputs) == 3


def test_priorities_decide_who_goes_first() -> None:
    engine = make_engine(max_num_seqs=1, scheduling_policy="priority")
    for name, priority in (("late", 2), ("first", 0), ("middle", 1)):
        engine.add_request(name, [1, 2, 3], greedy(2), priority=priority)
    assert list(run(engine)) == ["first", "middle", "late"]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt must not be empty"),
        ([5, 97], {}, "token id 97 is not in the vocabulary of 97"),
        ([-1], {}, "token id -1"),
        ([1] * 96, {}, "maximum context length is 96 tokens.*contains 96 input tokens"),
        ([1], {"logprobs": 21}, "logprobs must be at most 20, got 21"),
        ([1], {"prompt_logprobs": 21}, "prompt_logprobs must be at most 20, got 21"),
        ([1], {"stop_token_ids": [97]}, "stop_token_ids is not a token id .* got 97"),
        ([1], {"allowed_token_ids": [1, 200]}, "allowed_token_ids is not .* got 200"),
        ([1], {"logit_bias": {-3: 1.0}}, "logit_bias is not a token id .* got -3"),
    ],
)
def test_bad_requests_are_refused_and_the_next_is_served(
    engine: EngineCore, prompt: list[int], params: dict, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request("bad", prompt, SamplingParams(**params))
    engine.add_request("good", [1, 2, 3], greedy(3))
    assert run(engine)["good"].outputs[0].token_ids == expected([1, 2, 3], 3)


def test_nan_fails_its_own_request_only() -> None:
    tensors = {k: v.copy() for k, v in TENSORS.items()}
    tensors["model.embed_tokens.weight"][50] = np.nan
    engine = make_engine(tensors=tensors)
    engine.add_request("bad", [1] * 8 + [50, 2], greedy(3))
    engine.add_request("good", [1] * 8 + [2, 3], greedy(1))
    done = run(engine)
    assert done["bad"].outputs[0].finish_reason == "error"
    assert "logits at position 9 are not finite" in done["bad"].outputs[0].error
    assert done["good"].outputs[0].finish_reason == "length"
    engine.check()
    # What the failed request wrote is not found by others.
    engine.add_request("again", [1] * 8 + [50, 2, 3, 4, 5], greedy(1))
    assert run(engine)["again"].num_cached_tokens <= 8


def test_answers_end_at_the_context_length(engine: EngineCore) -> None:
    engine.add_request("a", [3] * 90, SamplingParams(temperature=0, max_tokens=None))
    output = run(engine)["a"].outputs[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 6


def test_too_small_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_model_len=96 needs 24 blocks .* room for 23"):
        make_engine(num_blocks=23)
