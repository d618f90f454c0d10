"""Suffix decoding on the device: what it drafts, and that answers stay what they were."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_cases import (
    ARRIVALS,
    BEGINNINGS,
    REQUESTS,
    SCHEDULES,
    assert_equal,
    check_any_schedule,
    generate,
    greedy,
    now_and_then,
)
from tiny_engine import (
    CONFIG,
    check_caches_are_updated_in_place,
    make_engine,
    make_tensors,
    write_files,
)
from tiny_speculator import LSTM, SHARING, write_speculator

from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.runner import LaunchedStep
from arctic_jax.engine.suffix_matching import MAX_MATCH_LEN, SuffixMatching
from arctic_jax.request import SamplingParams
from arctic_jax.scheduled_batch import ScheduledBatch
from arctic_jax.spec_decode.proposer import Proposer, build_proposer

K = 6
MATCHING = {"method": "suffix", "suffix_on_device": True, "num_speculative_tokens": K}
CRAMPED: dict[str, Any] = {
    "num_blocks": 26,
    "max_num_batched_tokens": 12,
    "max_num_mixed_tokens": 5,
    "max_num_seqs": 3,
}


def continuation(text: Sequence[int], token: int, matching: SuffixMatching) -> list[int]:
    """What `SuffixMatching` says it drafts, by looking at one place after the other."""
    known, found = [*text, token], (0, -1)
    for place in range(len(text)):
        length = 0
        while (
            length < min(MAX_MATCH_LEN, place + 1)
            and known[place - length] == known[len(text) - length]
        ):
            length += 1
        found = max(found, (length, place))
    length, place = found
    most = int(matching.max_spec_factor * length + matching.max_spec_offset + 1e-6)
    draft: list[int] = []
    while length and len(draft) < min(most, matching.num_tokens):
        draft.append([*known, *draft][place + 1 + len(draft)])
    return draft


continuations = jax.jit(SuffixMatching.continuations, static_argnums=0)
TEXTS = st.integers(1, 3).flatmap(
    lambda top: st.lists(st.integers(0, top), min_size=1, max_size=60)
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TEXTS, st.integers(0, 3)), min_size=3, max_size=3),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 1.0]),
)
def test_the_longest_and_last_match(texts: list, factor: float, offset: float) -> None:
    matching = SuffixMatching(K, 8, factor, offset)
    padded = np.full((3, 64), 3, np.int32)
    for row, (text, _) in zip(padded, texts, strict=True):
        row[: len(text)] = text
    ends = np.array([len(text) for text, _ in texts])
    tokens = jnp.array([token for _, token in texts])
    drafts = continuations(matching, jnp.array(padded), jnp.array(ends), tokens)
    for draft, (text, token) in zip(drafts.tolist(), texts, strict=True):
        wanted = continuation(text, token, matching)
        assert draft == wanted + [-1] * (K - len(wanted))


@pytest.fixture(scope="module", params=[1, 3], ids=lambda rounds: f"{rounds} rounds")
def matcher(request: pytest.FixtureRequest) -> EngineCore:
    """Prompts come in chunks of a few tokens, and requests preempt each other all the time."""
    return make_engine(speculative_config=MATCHING, num_scheduler_steps=request.param, **CRAMPED)


@pytest.fixture(
    scope="module",
    params=[("arctic", 1), ("arctic", 4), ("draft_model", 2)],
    ids=lambda case: f"{case[0]}, {case[1]} rounds",
)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    path = tmp_path_factory.mktemp("random")
    method, rounds = request.param
    config = {"method": method, "enable_suffix_decoding": True, "suffix_on_device": True}
    if method == "arctic":
        write_speculator(path, LSTM | SHARING)
    else:
        write_files(path, CONFIG, make_tensors())
        config["num_speculative_tokens"] = 3
    config |= {"model": str(path), "suffix_speculative_tokens": K}
    options = CRAMPED | {"max_num_seqs": 2, "num_scheduler_steps": rounds}
    return make_engine(speculative_config=config, **options)


def always(engine: EngineCore) -> Proposer:
    return build_proposer(replace(engine.config.speculative, adaptive=False))


@settings(SCHEDULES, max_examples=20)
@given(REQUESTS, ARRIVALS)
def test_any_schedule(matcher: EngineCore, requests: list, arrivals: list[int]) -> None:
    check_any_schedule(matcher, requests, arrivals, now_and_then(matcher))


@settings(SCHEDULES, max_examples=10)
@given(REQUESTS, ARRIVALS)
def test_any_schedule_of_the_hybrid(
    hybrid: EngineCore, requests: list, arrivals: list[int]
) -> None:
    check_any_schedule(hybrid, requests, arrivals, now_and_then(hybrid))


def repeating(prompt: Sequence[int], max_tokens: int) -> tuple[list[int], SamplingParams]:
    """An answer that says the prompt over and over: what is drafted is right."""
    bias = dict.fromkeys(prompt, 100.0)
    return [*prompt] * 2, greedy(max_tokens, logit_bias=bias)


class Launches:
    """Counts launches, and notes the lengths of drafts that the host had not seen."""

    def __init__(self, engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unseen: list[int] = []
        self.launched = 0
        launch = engine.runner.launch

        def noted(scheduled: ScheduledBatch) -> LaunchedStep:
            self.launched += 1
            unseen = [part for part in scheduled.requests if part.unseen]
            self.unseen += [part.num_drafted for part in unseen for _ in range(part.num_rounds)]
            return launch(scheduled)

        monkeypatch.setattr(engine.runner, "launch", noted)


def test_no_step_waits_for_the_host(matcher: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    check_no_step_waits(matcher, monkeypatch)


def test_no_step_of_the_hybrid_waits_for_the_host(
    hybrid: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_no_step_waits(hybrid, monkeypatch)


def check_no_step_waits(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [repeating([5], 60)]
    plain = generate(engine, requests)
    assert plain[0].token_ids == [5] * 60
    launches, proposer, before = Launches(engine, monkeypatch), always(engine), engine.num_steps
    assert_equal(generate(engine, requests, proposer)[0], plain[0])
    calls = engine.num_steps - before
    assert calls < 60 / 2
    assert (
        launches.launched >= calls - 3
    )  # the last calls: how many tokens are missing is not known
    assert sum(launches.unseen) >= 36
    assert proposer.stats.accepted.sum() > max(0.8 * proposer.stats.drafted.sum(), 30)


def test_preempted_and_cached_prompts_are_matched(matcher: EngineCore) -> None:
    """What is drafted from lies in the blocks of the cache, whoever wrote them."""
    requests = [repeating(BEGINNINGS[0][:1], 40) for _ in range(5)]
    plain = generate(matcher, requests)
    for _ in range(2):
        proposer = always(matcher)
        answers = generate(matcher, requests, proposer)
        assert [a.token_ids for a in answers] == [p.token_ids for p in plain]
        assert proposer.stats.accepted.sum() > 50


def test_tokens_are_written_in_place(matcher: EngineCore) -> None:
    check_caches_are_updated_in_place(matcher)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "ngram", "suffix_on_device": True}, "suffix_on_device must be false without"),
        (MATCHING | {"suffix_use_tree_spec": True}, "suffix_use_tree_spec must be false with"),
        (MATCHING | {"suffix_on_device": 1}, "suffix_on_device must be true or false, got 1"),
    ],
)
def test_what_does_not_go_together_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(speculative_config=config)


def test_a_match_shorter_than_the_speculators_draft_is_refused(tmp_path: Path) -> None:
    path = write_speculator(tmp_path / "spec", LSTM | SHARING)
    config = {"method": "arctic", "model": str(path), "enable_suffix_decoding": True}
    config |= {"suffix_on_device": True, "suffix_speculative_tokens": 2}
    with pytest.raises(ValueError, match=r"=2 are fewer than the 3 of '.*spec'"):
        make_engine(speculative_config=config)
