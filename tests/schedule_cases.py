"""Requests that come, go and are aborted at any time; what they must get is the plain model's."""

import dataclasses

import numpy as np
import plain_model
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiny_engine import CONFIG, GREEDY, make_tensors

from arctic_jax.engine.core import EngineCore
from arctic_jax.request import SamplingParams

TENSORS = make_tensors()

_known: dict[tuple[int, ...], list[int]] = {}


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    """The plain model's greedy answer."""
    key = tuple(prompt)
    if len(_known.get(key, [])) < max_tokens:
        _known[key] = plain_model.greedy(CONFIG, TENSORS, prompt, max_tokens)
    return _known[key][:max_tokens]


def greedy(max_tokens: int) -> SamplingParams:
    return dataclasses.replace(GREEDY, max_tokens=max_tokens)


# A request: which shared beginning, its own end, how many tokens, steps before it arrives, steps
# after which it is aborted (if it is).
REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 24),
        st.lists(st.integers(0, 96), min_size=1, max_size=30),
        st.integers(1, 12),
        st.integers(0, 6),
        st.none() | st.integers(0, 12),
    ),
    min_size=1,
    max_size=8,
)
BEGINNINGS = [[int(t) for t in np.random.default_rng(i).integers(0, 97, 24)] for i in range(3)]


def check_any_schedule(engine: EngineCore, requests: list) -> None:
    waiting = {}
    for i, (which, shared, own, max_tokens, arrives, aborted) in enumerate(requests):
        prompt = BEGINNINGS[which][:shared] + own
        waiting[str(i)] = (prompt, max_tokens, arrives, aborted)
    arrived, done = {}, {}
    step = 0
    while waiting or engine.has_requests:
        for name, (prompt, max_tokens, arrives, _) in list(waiting.items()):
            if arrives <= step:
                arrived[name] = waiting.pop(name)
                engine.add_request(name, prompt, greedy(max_tokens), priority=int(name) % 3)
        for name, (_, _, arrives, aborted) in arrived.items():
            if aborted is not None and arrives + aborted == step and name not in done:
                done[name] = engine.abort(name)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        engine.check()
        step += 1
        assert step < 1000
    for name, (prompt, max_tokens, _, _) in arrived.items():
        tokens = done[name].outputs[0].token_ids
        assert tokens == expected(prompt, max_tokens)[: len(tokens)]
        if done[name].outputs[0].finish_reason == "length":
            assert len(tokens) == max_tokens
        else:
            assert done[name].outputs[0].finish_reason == "abort"
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


SCHEDULES = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
