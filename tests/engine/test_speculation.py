"""Speculation in the engine: drafts change how many steps an answer takes, and nothing else."""

import dataclasses
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_cases import (
    ARRIVALS,
    BEGINNINGS,
    CONFIG,
    REQUESTS,
    SCHEDULES,
    TREE_CONFIG,
    K,
    Replay,
    ReplayTree,
    SideBranch,
    assert_equal,
    generate,
    greedy,
    replay,
)
from swiftkv_model import swiftkv_config, swiftkv_tensors
from tiny_engine import make_engine, run

from arctic_jax.engine.core import EngineCore
from arctic_jax.spec_decode.proposer import NoProposer
from arctic_jax.speculative_config import SpeculativeConfig


def speculative_engine(*arguments: Any, **options: Any) -> EngineCore:
    """One that verifies drafts of any form: paths, and trees."""
    config = {
        "method": "suffix",
        "num_speculative_tokens": TREE_CONFIG.max_draft_len,
        "suffix_use_tree_spec": True,
    }
    return make_engine(*arguments, speculative_config=config, **options)


@pytest.fixture(scope="module")
def engine() -> EngineCore:
    """One that verifies paths."""
    return make_engine(speculative_config={"method": "ngram", "num_speculative_tokens": K})


@pytest.fixture(scope="module")
def cramped_engine() -> EngineCore:
    """Prompts come in chunks of a few tokens, and requests preempt each other all the time."""
    return speculative_engine(num_blocks=26, max_num_batched_tokens=12, max_num_mixed_tokens=5)


@pytest.fixture(scope="module")
def swiftkv_engine() -> EngineCore:
    config = swiftkv_config(2, 2, 4)
    return speculative_engine(config, swiftkv_tensors(config), num_blocks=26)


@pytest.fixture(scope="module")
def two_layouts() -> EngineCore:
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices")
    return speculative_engine(
        tensor_parallel_size=2, ulysses_sequence_parallel_size=2, shift_parallel_threshold=6
    )


def check_any_schedule(
    engine: EngineCore,
    requests: list,
    arrivals: list[int],
    rate: float,
    seed: int,
    kind: type[Replay] = Replay,
) -> None:
    if not engine.runner.max_prompt_rows:  # SwiftKV
        requests = [(p, dataclasses.replace(s, prompt_logprobs=None)) for p, s in requests]
    plain = generate(engine, requests, arrivals=arrivals)
    drafted = generate(engine, requests, replay(plain, rate, seed, kind), arrivals)
    for actual, wanted in zip(drafted, plain, strict=True):
        assert_equal(actual, wanted)


RATES = st.sampled_from([0.0, 0.5, 0.9, 1.0])
KINDS = st.sampled_from([ReplayTree, SideBranch, Replay])


@SCHEDULES
@given(REQUESTS, ARRIVALS, RATES, st.integers(0, 99))
def test_any_schedule(
    engine: EngineCore, requests: list, arrivals: list[int], rate: float, seed: int
) -> None:
    check_any_schedule(engine, requests, arrivals, rate, seed)


@SCHEDULES
@given(REQUESTS, ARRIVALS, RATES, st.integers(0, 99), KINDS)
def test_any_schedule_under_preemption(
    cramped_engine: EngineCore,
    requests: list,
    arrivals: list[int],
    rate: float,
    seed: int,
    kind: type[Replay],
) -> None:
    check_any_schedule(cramped_engine, requests, arrivals, rate, seed, kind)


@SCHEDULES
@given(REQUESTS, ARRIVALS, RATES, st.integers(0, 99), KINDS)
def test_any_schedule_with_swiftkv(
    swiftkv_engine: EngineCore,
    requests: list,
    arrivals: list[int],
    rate: float,
    seed: int,
    kind: type[Replay],
) -> None:
    check_any_schedule(swiftkv_engine, requests, arrivals, rate, seed, kind)


@settings(SCHEDULES, max_examples=10)
@given(REQUESTS, ARRIVALS, RATES, st.integers(0, 99), KINDS)
def test_any_schedule_in_both_layouts(
    two_layouts: EngineCore,
    requests: list,
    arrivals: list[int],
    rate: float,
    seed: int,
    kind: type[Replay],
) -> None:
    check_any_schedule(two_layouts, requests, arrivals, rate, seed, kind)


def test_right_drafts_take_fewer_steps(engine: EngineCore) -> None:
    requests = [(BEGINNINGS[0], greedy(21))]
    plain = generate(engine, requests)
    proposer = replay(plain, rate=1.0)
    engine.proposer = proposer
    engine.add_request("0", *requests[0])
    steps, outputs = 0, []
    while engine.has_requests:
        outputs = engine.step()
        steps += bool(outputs)
    assert outputs[0].outputs[0].token_ids == plain[0].token_ids
    # One token by the prompt, then four a step.
    assert steps == 1 + 20 // (K + 1) + 1  # the step launched before the first draft draws one
    assert proposer.stats.drafted.tolist() == proposer.stats.accepted.tolist()
    metrics = outputs[0].metrics
    assert metrics.num_drafted_tokens == metrics.num_accepted_tokens == proposer.stats.drafted.sum()


def test_wrong_drafts_are_counted_as_wrong(engine: EngineCore) -> None:
    requests = [(BEGINNINGS[0], greedy(12))]
    plain = generate(engine, requests)
    wrong = Replay(lambda _: [(t + 1) % 97 for t in plain[0].token_ids], rate=1.0)
    assert_equal(generate(engine, requests, wrong)[0], plain[0])
    assert wrong.stats.drafted[0] == wrong.stats.num_drafts > 5
    assert wrong.stats.accepted.sum() == 0


@pytest.fixture(params=[Replay, SideBranch], ids=["paths", "trees"])
def kind(request: pytest.FixtureRequest) -> type[Replay]:
    return request.param


@pytest.fixture
def verifier(kind: type[Replay], request: pytest.FixtureRequest) -> EngineCore:
    """An engine for that kind of drafts."""
    return request.getfixturevalue("engine" if kind is Replay else "cramped_engine")


@pytest.mark.parametrize("length", [93, 94, 95, 92])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_answers_end_at_the_context_length(
    verifier: EngineCore, kind: type[Replay], length: int, rate: float
) -> None:
    requests = [([3] * length, greedy(None))]
    plain = generate(verifier, requests)
    assert len(plain[0].token_ids) == 96 - length
    assert_equal(generate(verifier, requests, replay(plain, rate, kind=kind))[0], plain[0])


def test_accepted_side_branches_are_moved_to_where_a_path_lies(cramped_engine: EngineCore) -> None:
    requests = [(BEGINNINGS[0], greedy(29))]
    plain = generate(cramped_engine, requests)
    proposer = replay(plain, rate=1.0, kind=SideBranch)
    assert_equal(generate(cramped_engine, requests, proposer)[0], plain[0])
    # Four drafts of seven tokens, of which the last four are right; one of six, and one of two.
    stats = proposer.stats
    assert stats.num_drafts == 6
    assert stats.drafted.tolist() == [12, 10, 10, 4, 0, 0, 0]
    assert stats.accepted.tolist() == [6, 5, 5, 4, 0, 0, 0]


def test_nothing_moves_where_the_likeliest_path_is_right(
    cramped_engine: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(BEGINNINGS[0], greedy(29))]
    plain = generate(cramped_engine, requests)
    moves = []
    move = cramped_engine.runner.programs.move

    def record(cache: Any, slots: Any) -> Any:
        moves.extend(slots)
        return move(cache, slots)

    monkeypatch.setattr(cramped_engine.runner.programs, "move", record)
    generate(cramped_engine, requests, replay(plain, rate=1.0))
    assert not moves
    generate(cramped_engine, requests, replay(plain, rate=1.0, kind=SideBranch))
    assert moves


@pytest.mark.parametrize("at", range(8))
def test_an_end_inside_a_draft_ends_the_answer(
    verifier: EngineCore, kind: type[Replay], at: int
) -> None:
    engine, prompt = verifier, BEGINNINGS[1]
    whole = generate(engine, [(prompt, greedy(12))])
    token = whole[0].token_ids[at]
    beyond = replay(whole, 1.0, kind=kind)
    # The drafter goes on past every end.
    for params in (
        greedy(12, stop_token_ids=[token]),
        greedy(12, stop=engine.tokenizer.decode([token]).strip()),
        greedy(12, stop_token_ids=[token], min_tokens=at + 2),
        greedy(at + 1),
    ):
        plain = generate(engine, [(prompt, params)])
        assert_equal(generate(engine, [(prompt, params)], beyond)[0], plain[0])
    stopped = generate(engine, [(prompt, greedy(12, stop_token_ids=[token]))], beyond)
    first = whole[0].token_ids.index(token)
    assert stopped[0].token_ids == whole[0].token_ids[: first + 1]


def test_blocks_with_rejected_tokens_are_not_found(
    verifier: EngineCore, kind: type[Replay]
) -> None:
    engine, prompt = verifier, BEGINNINGS[2]
    plain = generate(engine, [(prompt, greedy(40))])
    tokens = plain[0].token_ids
    engine.reset_prefix_cache()
    proposer = replay(plain, rate=0.5, seed=1, kind=kind)
    generate(engine, [(prompt, greedy(20))], proposer)
    assert 0 < proposer.stats.accepted.sum() < proposer.stats.drafted.sum()
    engine.proposer = NoProposer()
    engine.add_request("a", prompt + tokens[:19], greedy(21), cache_salt=str(id(proposer)))
    output = run(engine)["a"]
    assert output.num_cached_tokens == (len(prompt) + 19 - 1) // 4 * 4
    assert output.outputs[0].token_ids == tokens[19:]


def test_who_does_not_speculate_gets_a_token_each_step(engine: EngineCore) -> None:
    requests = [(BEGINNINGS[0], greedy(16)), (BEGINNINGS[1], greedy(16, bad_words=None))]
    plain = generate(engine, requests)
    only_first = Replay(lambda r: plain[0].token_ids if r.request_id == "0" else [], rate=1.0)
    engine.proposer = only_first
    for i, request in enumerate(requests):
        engine.add_request(str(i), *request)
    grown = []
    while engine.has_requests:
        for output in engine.step():
            if output.request_id == "1":
                grown.append(len(output.outputs[0].token_ids))
    assert grown == list(range(1, 17))
    assert only_first.stats.num_drafts > 0


def test_requests_with_drafts_share_their_steps(engine: EngineCore) -> None:
    requests = [(prompt, greedy(30)) for prompt in BEGINNINGS]
    plain = generate(engine, requests)
    engine.proposer = replay(plain, rate=1.0)
    together = 0
    for i, request in enumerate(requests):
        engine.add_request(str(i), *request)
        for _ in range(2 * i + 1):  # they begin in odd and in even steps
            engine.step()
    for _ in range(6):
        engine.step()
        together = max(together, sum(r.verifies for r in engine.scheduler.running))
    assert together == 3
    run(engine)


def test_a_mesh_of_nothing_but_right_drafts(two_layouts: EngineCore) -> None:
    requests = [(prompt, greedy(24)) for prompt in BEGINNINGS]
    plain = generate(two_layouts, requests)
    proposer = replay(plain, rate=1.0)
    for actual, wanted in zip(generate(two_layouts, requests, proposer), plain, strict=True):
        assert_equal(actual, wanted)
    assert proposer.stats.accepted.sum() == proposer.stats.drafted.sum() > 30


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("engine", dataclasses.replace(CONFIG, method="suffix")),
        ("engine", dataclasses.replace(CONFIG, prompt_lookup_min=1, prompt_lookup_max=3)),
        ("cramped_engine", dataclasses.replace(TREE_CONFIG, suffix_max_spec_offset=5.0)),
    ],
    ids=["suffix", "ngram", "suffix_trees"],
)
def test_real_drafters_change_no_answer(
    name: str, config: SpeculativeConfig, request: pytest.FixtureRequest
) -> None:
    from arctic_jax.spec_decode.proposer import build_proposer

    engine = request.getfixturevalue(name)
    requests = [(BEGINNINGS[i % 3][: 3 + i] * 2, greedy(30)) for i in range(6)]
    plain = generate(engine, requests)
    proposer = build_proposer(config)
    for actual, wanted in zip(generate(engine, requests, proposer), plain, strict=True):
        assert_equal(actual, wanted)
    assert proposer.stats.num_drafts > 0
    again = generate(engine, requests, proposer)  # what the first ones said is known now
    assert [a.token_ids for a in again] == [p.token_ids for p in plain]
    adaptive = build_proposer(dataclasses.replace(config, adaptive=True))
    assert [a.token_ids for a in generate(engine, requests, adaptive)] == [
        p.token_ids for p in plain
    ]


def test_nothing_is_compiled_after_ready(verifier: EngineCore, kind: type[Replay]) -> None:
    events: list[str] = []
    listening = [True]

    def listen(event: str, duration_secs: float, **kwargs: object) -> None:
        if listening and "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    requests = [([i] * (2 + 5 * i), greedy(9, logprobs=i)) for i in range(6)]
    generate(verifier, requests, replay(generate(verifier, requests), 0.8, kind=kind))
    listening.clear()
    assert events == []
