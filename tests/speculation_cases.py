"""What tests of speculation share: requests of all kinds, and a drafter whose success is known."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiny_engine import GREEDY

from arctic_jax.batch import HostOutput
from arctic_jax.engine.core import EngineCore
from arctic_jax.request import CompletionOutput, Request, SamplingParams
from arctic_jax.scheduled_batch import ScheduledBatch
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.host_proposer import HostProposer
from arctic_jax.spec_decode.proposer import NoProposer, Proposer, build_proposer
from arctic_jax.speculative_config import SpeculativeConfig

K = 3
CONFIG = SpeculativeConfig("ngram", num_speculative_tokens=K, adaptive=False)
TREE_CONFIG = dataclasses.replace(
    CONFIG, method="suffix", num_speculative_tokens=7, suffix_use_tree_spec=True
)


class Replay(HostProposer):
    """Drafts each token rightly with a given probability, from answers that are known.

    Args:
        answers: to a request: its output tokens without speculation.
        rate: of right tokens.
        seed: of the wrong ones, and of the lengths of drafts.
    """

    CONFIG = CONFIG

    def __init__(
        self, answers: Callable[[Request], Sequence[int]], rate: float, seed: int = 0
    ) -> None:
        super().__init__(self.CONFIG)
        self.answers, self.rate = answers, rate
        self.rng = np.random.default_rng(seed)

    def start(self, request: Request) -> None:
        pass

    def observe(self, tokens: Mapping[Request, Sequence[int]]) -> None:
        pass

    def stop(self, request: Request) -> None:
        pass

    def drafts(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        return [self.draft(r, limit) for r, limit in zip(requests, limits, strict=True)]

    def draft(self, request: Request, limit: int) -> Draft:
        begin = len(request.output_token_ids)
        tokens = [int(t) for t in self.answers(request)[begin : begin + limit]]
        if self.rate < 1:
            tokens = tokens[: self.rng.integers(0, limit, endpoint=True)]
        right = self.rng.random(len(tokens)) < self.rate
        wrong = self.rng.integers(0, 97, len(tokens))
        tokens = [t if ok else int(w) for t, ok, w in zip(tokens, right, wrong, strict=True)]
        return Draft(tokens, [1.0] * len(tokens))


class ReplayTree(Replay):
    """The same with trees of any form, where the right tokens may be in any branch."""

    CONFIG = TREE_CONFIG

    def draft(self, request: Request, limit: int) -> Draft:
        begin, rng = len(request.output_token_ids), self.rng
        answer = [int(t) for t in self.answers(request)[begin : begin + limit]]
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        right = [-1]  # the tokens of the answer that are in the tree, from the one before it on
        for i in range(len(answer) if self.rate == 1 else rng.integers(0, len(answer) + 1)):
            goes_on = len(right) <= len(answer) and rng.random() < 0.6
            parent = right[-1] if goes_on else int(rng.integers(-1, i))
            others = [t for t, p in zip(tokens, parents, strict=True) if p == parent]
            token = int(rng.integers(0, 97))
            if goes_on and rng.random() < self.rate:
                token = answer[len(right) - 1]
            while token in others:
                token = (token + 1) % 97
            if (
                parent == right[-1]
                and len(right) <= len(answer)
                and token == answer[len(right) - 1]
            ):
                right.append(i)
            tokens.append(token)
            parents.append(parent)
            probs.append(rng.random() * (probs[parent] if parent >= 0 else 1.0))
        return Draft.of_tree(tokens, parents, probs, sum(probs))


class SideBranch(Replay):
    """Drafts wrong tokens as the likeliest path, and the right ones beside it."""

    CONFIG = TREE_CONFIG

    def draft(self, request: Request, limit: int) -> Draft:
        begin = len(request.output_token_ids)
        right = [int(t) for t in self.answers(request)[begin : begin + (limit + 1) // 2]]
        wrong = [(t + 1) % 97 for t in right[: limit // 2]]
        parents = [-1, *range(len(wrong) - 1), -1, *range(len(wrong), len(wrong) + len(right) - 1)]
        probs = [0.9] * len(wrong) + [0.8] * len(right)
        return Draft.of_tree(wrong + right, parents[-len(probs) :], probs, 1.0)


class Recorder(Replay):
    """Proposes what is known to come, some of it wrong, and notes what the device drafts."""

    wants_drafts = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.drafted: list[tuple[list[int], list[int]]] = []

    def propose(self, scheduled: ScheduledBatch, output: HostOutput) -> None:
        for part, draft in zip(scheduled.requests, output.drafts.tolist(), strict=False):
            if part.samples and not part.request.status.finished:
                known = part.request.prompt_token_ids + part.request.output_token_ids
                self.drafted.append((known, draft))
        super().propose(scheduled, output)


def now_and_then(engine: EngineCore) -> Proposer:
    """The engine's own proposer with all drafts made, and steps left out that draft by chance."""
    proposer = build_proposer(dataclasses.replace(engine.config.speculative, adaptive=False))
    propose, rng = proposer.propose, np.random.default_rng(0)

    def proposed(scheduled: ScheduledBatch, output: HostOutput) -> None:
        propose(scheduled, output)
        proposer.wants_drafts = bool(rng.random() < 0.7)

    proposer.propose = proposed
    return proposer


def greedy(max_tokens: int | None, **more: Any) -> SamplingParams:
    return dataclasses.replace(GREEDY, max_tokens=max_tokens, **more)


def generate(
    engine: EngineCore,
    requests: Sequence[tuple[list[int], SamplingParams]],
    proposer: Proposer | None = None,
    arrivals: Sequence[int] | None = None,
) -> list[CompletionOutput]:
    """The answers, with all drafts from one proposer; no block is ever leaked."""
    engine.proposer = proposer or NoProposer()
    waiting = dict(enumerate(requests))
    arrivals = arrivals or [0] * len(requests)
    done, step = {}, 0
    while waiting or engine.has_requests:
        for i in [i for i in waiting if arrivals[i] <= step]:
            engine.add_request(str(i), *waiting.pop(i), cache_salt=str(id(proposer)))
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output.outputs[0]
        engine.check()
        step += 1
        assert step < 3000
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    return [done[str(i)] for i in range(len(requests))]


def replay(
    plain: Sequence[CompletionOutput], rate: float, seed: int = 0, kind: type[Replay] = Replay
) -> Replay:
    return kind(lambda request: plain[int(request.request_id)].token_ids, rate, seed)


def assert_equal(actual: CompletionOutput, plain: CompletionOutput) -> None:
    for name in ("token_ids", "text", "finish_reason", "stop_reason", "error"):
        assert getattr(actual, name) == getattr(plain, name), name
    for entries, others in zip(actual.logprobs or (), plain.logprobs or (), strict=True):
        mine, theirs = ({t: e.logprob for t, e in some.items()} for some in (entries, others))
        both = mine.keys() & theirs.keys()
        assert [mine[t] for t in both] == pytest.approx([theirs[t] for t in both], abs=2e-4)
        # Of equally likely tokens either may have the last place.
        left, right = (
            sorted(v for t, v in some.items() if t not in both) for some in (mine, theirs)
        )
        assert left == pytest.approx(right, abs=2e-4)


def check_any_schedule(
    engine: EngineCore, requests: list, arrivals: list[int], *more: Proposer
) -> None:
    """The drafts of the engine's own proposer, and of `more`, change no answer."""
    if not engine.runner.max_prompt_rows:  # SwiftKV
        requests = [(p, dataclasses.replace(s, prompt_logprobs=None)) for p, s in requests]
    plain = generate(engine, requests, arrivals=arrivals)
    for proposer in (*more, build_proposer(engine.config.speculative)):
        drafted = generate(engine, requests, proposer, arrivals)
        for actual, wanted in zip(drafted, plain, strict=True):
            assert_equal(actual, wanted)


BEGINNINGS = [[int(t) for t in np.random.default_rng(i).integers(0, 97, 24)] for i in range(3)]
PROMPTS = st.tuples(
    st.integers(0, 2),
    st.integers(0, 24),
    st.lists(st.integers(0, 96), min_size=1, max_size=30),
).map(lambda parts: BEGINNINGS[parts[0]][: parts[1]] + parts[2])
PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 16) | st.none()},
    optional={
        "temperature": st.sampled_from([0.5, 1.0, 1.5]),
        "top_k": st.integers(1, 20),
        "top_p": st.floats(0.3, 1.0),
        "min_p": st.floats(0.0, 0.2),
        "seed": st.integers(0, 1000),
        "repetition_penalty": st.floats(0.6, 1.6),
        "presence_penalty": st.floats(-1, 2),
        "frequency_penalty": st.floats(-1, 2),
        "logit_bias": st.dictionaries(st.integers(0, 96), st.floats(-5, 5), max_size=5),
        "bad_words": st.lists(st.integers(0, 96).map(str), min_size=1, max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, 96), min_size=1, max_size=60),
        "logprobs": st.integers(0, 5),
        "prompt_logprobs": st.integers(0, 3),
        "stop_token_ids": st.lists(st.integers(0, 96), min_size=1, max_size=10),
        "stop": st.lists(st.integers(0, 99).map(str), min_size=1, max_size=4),
    },
).map(lambda given: SamplingParams(**({"temperature": 0.0, "seed": 0} | given)))
MIN_TOKENS = st.tuples(PARAMS, st.integers(0, 8)).map(
    lambda pair: dataclasses.replace(pair[0], min_tokens=min(pair[1], pair[0].max_tokens or 99))
)
REQUESTS = st.lists(st.tuples(PROMPTS, PARAMS | MIN_TOKENS), min_size=1, max_size=7)
ARRIVALS = st.lists(st.integers(0, 8), min_size=7, max_size=7)
SCHEDULES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
