"""SwiftKV in the engine: any schedule, any mesh, both layouts, and the memory that is saved."""

import dataclasses
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import plain_model
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swiftkv_model import prompt_of, swiftkv_config, swiftkv_tensors
from tiny_engine import CONFIG, GREEDY, check_caches_are_updated_in_place, make_engine, run

from arctic_jax.engine.core import EngineCore
from arctic_jax.errors import InvalidRequestError
from arctic_jax.models.layers import named_parameters
from arctic_jax.request import SamplingParams

LAYERS, LOWER = 4, 2
PROMPTS = [prompt_of(n, seed) for seed, n in enumerate((1, 5, 40, 33))]


def swiftkv_engine(group: int = 2, **options: Any) -> EngineCore:
    config = swiftkv_config(LOWER, group, LAYERS)
    return make_engine(config, swiftkv_tensors(config), **options)


def expected(prompt: list[int], max_tokens: int, group: int = 2) -> list[int]:
    key = (*prompt, -group)
    if len(_known.get(key, [])) < max_tokens:
        config = swiftkv_config(LOWER, group, LAYERS)
        tensors = swiftkv_tensors(config)
        _known[key] = plain_model.greedy(config, tensors, prompt, max_tokens)
    return _known[key][:max_tokens]


_known: dict[tuple[int, ...], list[int]] = {}


def check_answers(engine: EngineCore, prompts: list[list[int]], group: int = 2) -> None:
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    done = run(engine)
    engine.check()
    for i, prompt in enumerate(prompts):
        tokens = done[str(i)].outputs[0].token_ids
        assert tokens == expected(prompt, GREEDY.max_tokens, group)


@pytest.fixture(scope="module")
def cramped_engine() -> EngineCore:
    """Prompts come in chunks of a few tokens, and requests preempt each other."""
    return swiftkv_engine(num_blocks=26, max_num_batched_tokens=8, max_num_mixed_tokens=5)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 20), st.integers(1, 12), st.integers(0, 6)),
        min_size=1,
        max_size=6,
    )
)
def test_any_schedule(cramped_engine: EngineCore, requests: list) -> None:
    """Chunks, shared prefixes and preemption: the tokens of the plain model."""
    engine, beginnings = cramped_engine, [prompt_of(20, 7), prompt_of(20, 8)]
    waiting = {
        str(i): (beginnings[which][:shared] + prompt_of(own, i), arrives)
        for i, (which, shared, own, arrives) in enumerate(requests)
    }
    prompts, done, step = {name: prompt for name, (prompt, _) in waiting.items()}, {}, 0
    while waiting or engine.has_requests:
        for name, (prompt, arrives) in list(waiting.items()):
            if arrives <= step:
                engine.add_request(name, prompt, GREEDY)
                del waiting[name]
        done |= {o.request_id: o for o in engine.step() if o.finished}
        engine.check()
        step += 1
        assert step < 1000
    for name, prompt in prompts.items():
        assert done[name].outputs[0].token_ids == expected(prompt, GREEDY.max_tokens)


def test_the_cramped_engine_does_preempt(cramped_engine: EngineCore) -> None:
    longer = dataclasses.replace(GREEDY, max_tokens=40)
    for i in range(4):
        cramped_engine.add_request(str(i), [i] * 24, longer)
    done = run(cramped_engine)
    assert sum(o.metrics.num_preemptions for o in done.values()) > 0
    for i in range(4):
        assert done[str(i)].outputs[0].token_ids == expected([i] * 24, 40)


def test_a_chunk_that_ends_before_its_prompt_has_no_row() -> None:
    engine = swiftkv_engine(max_num_batched_tokens=8)
    engine.add_request("a", PROMPTS[2], GREEDY)
    rows = []
    while engine.has_requests:
        engine.step()
        if engine._in_flight is not None:
            rows.append(engine._in_flight.scheduled.num_rows)
    assert rows == [0] * 4 + [1] * GREEDY.max_tokens


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("threshold", [0, 4, 10**6])
def test_both_layouts_give_the_same_tokens(threshold: int, group: int) -> None:
    engine = swiftkv_engine(
        group,
        tensor_parallel_size=2,
        ulysses_sequence_parallel_size=2,
        shift_parallel_threshold=threshold,
    )
    check_answers(engine, PROMPTS, group)
    check_answers(engine, PROMPTS, group)  # with what is left of the prefixes in the cache
    layouts = {layout.name for layout, _ in engine.runner.picker.steps}
    assert layouts == {0: {"ulysses"}, 4: {"ulysses", "shift"}, 10**6: {"shift"}}[threshold]


@pytest.mark.parametrize(
    ("tp", "sp"),
    [
        (2, 4),
        *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((2, 1), (1, 2), (1, 4), (1, 8))),
    ],
)
def test_any_mesh_gives_the_same_tokens(tp: int, sp: int) -> None:
    """Key/value heads are copied on four and eight devices."""
    sizes = {"tensor_parallel_size": tp, "ulysses_sequence_parallel_size": sp}
    engine = swiftkv_engine(**sizes, shift_parallel_threshold=4 if sp > 1 else None)
    check_answers(engine, PROMPTS)


def test_collectives_of_the_programs() -> None:
    """Exactly one gather where the batch narrows; above it no tokens are exchanged any more."""
    engine = swiftkv_engine(
        tensor_parallel_size=2, ulysses_sequence_parallel_size=2, shift_parallel_threshold=4
    )
    for layout, bucket in engine.runner.picker.steps:
        text = engine.runner.programs.hlo(layout, bucket)
        count = Counter(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-permute)\(", text))
        # One reduction after the embedding and two a layer; one gather of the logits.
        if layout.name == "shift":
            assert count == {"all-reduce": 1 + 2 * LAYERS, "all-gather": 1}
        else:
            assert count == {
                "all-to-all": 2 * LOWER,
                "all-reduce": 1 + 2 * LAYERS,
                "reduce-scatter": 1,
                "all-gather": 2,
            }
    check_caches_are_updated_in_place(engine)


def test_weights_are_not_stored_twice() -> None:
    """The upper layers lie the same in both layouts, the lower ones share their memory."""
    engine = swiftkv_engine(
        tensor_parallel_size=2, ulysses_sequence_parallel_size=2, shift_parallel_threshold=4
    )
    few, many = (engine.runner.leaves[layout] for layout in engine.runner.layouts)
    for fine, coarse in zip(few, many, strict=True):
        for view, whole in zip(fine.addressable_shards, coarse.addressable_shards, strict=True):
            offset = view.data.unsafe_buffer_pointer() - whole.data.unsafe_buffer_pointer()
            assert 0 <= offset <= whole.data.nbytes - view.data.nbytes
    program, coarse = engine.runner.programs._program, engine.runner.layouts[-1]
    parts = {
        member: stack.shape[0] // stack.rows[coarse]
        for stack in program.weights.stacks
        for member in stack.members
    }
    model, _ = program._modules()
    for member, path in enumerate(named_parameters(model)):
        number = parts[member]
        upper = path.startswith(("upper", "embed", "lm_head"))
        assert number == (1 if "norm" in path else 4 if upper else 2), path


def test_across_kv_saves_cache_memory() -> None:
    """Groups of 4 at half depth: 62.5 % of the bytes a token, 1.6 times the blocks."""
    found = {}
    for lower, group in ((8, 1), (4, 1), (4, 4)):
        config = swiftkv_config(lower, group, layers=8, max_position_embeddings=4096)
        engine = make_engine(
            config,
            swiftkv_tensors(config),
            num_blocks=None,
            cpu_memory_share=BUDGET / _memory(),
            max_num_seqs=4,
            max_model_len=2048,
        )
        spec = engine.runner.cache_spec
        caches = jax.tree.leaves(engine.runner.caches)
        assert sum(c.nbytes for c in caches) == spec.bytes_per_block * engine.runner.num_blocks
        found[lower, group] = spec.bytes_per_block, engine.runner.num_blocks
    base_bytes, base_blocks = found[8, 1]
    assert found[4, 1] == found[8, 1]
    assert found[4, 4][0] == 0.625 * base_bytes
    assert found[4, 4][1] == BUDGET // found[4, 4][0]
    assert found[4, 4][1] == pytest.approx(base_blocks / 0.625, rel=0.01)


BUDGET = 8 * 2 * 2 * 8 * 4 * 4 * 600  # bytes: 600 blocks of eight layers


def _memory() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_prompt_logprobs_are_refused_and_the_next_is_served() -> None:
    engine = swiftkv_engine()
    with pytest.raises(InvalidRequestError, match=r"prompt_logprobs is not available .*SwiftKV"):
        engine.add_request("bad", [1, 2, 3], SamplingParams(prompt_logprobs=0))
    check_answers(engine, PROMPTS)


def test_without_upper_layers_prompt_logprobs_are_served() -> None:
    config = swiftkv_config(LAYERS, 1, LAYERS)
    engine = make_engine(config, swiftkv_tensors(config))
    engine.add_request("a", PROMPTS[1], SamplingParams(prompt_logprobs=0, max_tokens=1))
    assert len(run(engine)["a"].prompt_logprobs) == len(PROMPTS[1])


def test_logprobs_of_answers_are_those_of_the_plain_model() -> None:
    engine, prompt = swiftkv_engine(), PROMPTS[2]
    engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=3, logprobs=5))
    answer = run(engine)["a"].outputs[0]
    config = swiftkv_config(LOWER, 2, LAYERS)
    logits = plain_model.logits(config, swiftkv_tensors(config), prompt + answer.token_ids)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, entries in enumerate(answer.logprobs):
        for token, entry in entries.items():
            expected_one = logprobs[len(prompt) - 1 + i, token]
            assert entry.logprob == pytest.approx(expected_one, abs=1e-4)


def test_the_base_model_still_has_its_prompt_rows() -> None:
    assert make_engine(CONFIG).runner.max_prompt_rows > 0
