"""Both layouts in one engine: the same tokens, the same weights, the same cache."""

import functools
import gc
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import plain_model
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import (
    CONFIG,
    GREEDY,
    check_caches_are_updated_in_place,
    make_engine,
    make_tensors,
    run,
)

from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.crossover import Crossover
from arctic_jax.engine.layout_picker import LayoutPicker
from arctic_jax.engine.runner import ModelRunner
from arctic_jax.request import Request, SamplingParams
from arctic_jax.scheduled_batch import Bucket, ScheduledBatch, ScheduledRequest, bucket_ladder
from arctic_jax.shift_parallel import MeshLayout, shift, ulysses
from arctic_jax.weight_stacks import WeightStacks

TENSORS = make_tensors()
MESHES = [
    (1, 4),
    (2, 4),
    *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((1, 2), (1, 8), (2, 2), (4, 2))),
]
PROMPTS = [
    [int(t) for t in np.random.default_rng(i).integers(0, 97, n)]
    for i, n in enumerate((1, 5, 40, 33))
]


class Alternating(LayoutPicker):
    """Takes the other layout every step."""

    def __init__(self, ladders: dict[MeshLayout, tuple[Bucket, ...]]) -> None:
        super().__init__(dict.fromkeys(ladders, ()), 0)
        self._ladders = ladders
        self._turn = itertools.cycle(ladders)

    def pick(self, scheduled: ScheduledBatch) -> tuple[MeshLayout, Bucket]:
        layout = next(self._turn)
        return layout, Bucket.fit(scheduled, self._ladders[layout])


def shifting_engine(tp: int, sp: int, config: dict = CONFIG, **options: Any) -> EngineCore:
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    tensors = TENSORS if config is CONFIG else make_tensors(config)
    return make_engine(
        config, tensors, tensor_parallel_size=tp, ulysses_sequence_parallel_size=sp, **options
    )


def answers(engine: EngineCore, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    done = run(engine)
    engine.check()
    return [done[str(i)].outputs[0].token_ids for i in range(len(prompts))]


def expected(config: dict = CONFIG, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    tensors = TENSORS if config is CONFIG else make_tensors(config)
    return [plain_model.greedy(config, tensors, prompt, GREEDY.max_tokens) for prompt in prompts]


@pytest.mark.parametrize("threshold", [0, 4, 10**6])
def test_any_threshold_gives_the_same_tokens(threshold: int) -> None:
    engine = shifting_engine(2, 2, shift_parallel_threshold=threshold)
    assert answers(engine) == expected()
    layouts = {layout.name for layout, _ in engine.runner.picker.steps}
    assert layouts == {0: {"ulysses"}, 4: {"ulysses", "shift"}, 10**6: {"shift"}}[threshold]


def alternating_engine(tp: int, sp: int, config: dict = CONFIG, **options: Any) -> EngineCore:
    engine = shifting_engine(tp, sp, config, shift_parallel_threshold=0, **options)
    runner = engine.runner
    runner.picker = Alternating(runner._ladders)
    steps = [(layout, bucket) for layout, ladder in runner._ladders.items() for bucket in ladder]
    runner.programs.compile(steps, runner.num_blocks)
    return engine


@pytest.mark.parametrize(("tp", "sp"), MESHES)
def test_another_layout_every_step(tp: int, sp: int) -> None:
    # Blocks for two and a half of the four requests: they preempt each other. Three requests at
    # once are no multiple of the devices.
    engine = alternating_engine(tp, sp, num_blocks=26, max_num_seqs=3)
    assert answers(engine) == expected()
    assert answers(engine) == expected()  # now with what is left of the prefixes in the cache


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of one shape in one array, as on GPUs."""
    together = functools.partial(WeightStacks.plan, together=True)
    monkeypatch.setattr(WeightStacks, "plan", together)


@pytest.mark.usefixtures("stacked")
def test_another_layout_every_step_with_stacked_weights() -> None:
    config = CONFIG | {"num_hidden_layers": 3}
    engine = alternating_engine(2, 2, config, num_blocks=26, max_num_seqs=3)
    leaves = engine.runner.leaves[engine.runner.layouts[0]]
    assert len(leaves) == 12  # four kinds of matrices are three shapes; vocabulary, seven norms
    assert answers(engine) == expected(config)


def test_biases_and_tied_embeddings_have_finer_shards_too() -> None:
    config = CONFIG | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    }
    tensors = make_tensors(config)
    for layer in range(config["num_hidden_layers"]):
        for i, name in enumerate("qkv"):
            weight = tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            bias = np.random.default_rng(i).normal(size=len(weight)).astype(np.float32)
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = bias
    sizes = {"tensor_parallel_size": 2, "ulysses_sequence_parallel_size": 2}
    alone = answers(make_engine(config, tensors))
    for threshold in (0, 4, 100):
        engine = make_engine(config, tensors, **sizes, shift_parallel_threshold=threshold)
        assert answers(engine) == alone


def test_everything_else_works_in_both_layouts() -> None:
    """Draws, penalties, log-probabilities, prompts in chunks: as on one device."""
    params = SamplingParams(
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        seed=7,
        max_tokens=10,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        logit_bias={5: 2.0},
        logprobs=3,
        prompt_logprobs=2,
    )
    found = []
    for engine in (make_engine(CONFIG, TENSORS), alternating_engine(2, 2)):
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, params)
        done = run(engine)
        found.append([done[str(i)] for i in range(len(PROMPTS))])
    for one, four in zip(*found, strict=True):
        assert one.outputs[0].token_ids == four.outputs[0].token_ids
        pairs = zip(one.outputs[0].logprobs, four.outputs[0].logprobs, strict=True)
        prompt_pairs = zip(one.prompt_logprobs[1:], four.prompt_logprobs[1:], strict=True)
        for expected_ones, actual in (*pairs, *prompt_pairs):
            assert actual.keys() == expected_ones.keys()
            for token, entry in expected_ones.items():
                assert actual[token].logprob == pytest.approx(entry.logprob, abs=1e-4)


@pytest.mark.gpu
def test_the_second_layout_takes_no_memory() -> None:
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    used = []
    config = CONFIG | {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    for enabled in (False, True):
        engine = make_engine(
            config,
            make_tensors(config),
            ulysses_sequence_parallel_size=2,
            enable_shift_parallel=enabled,
            shift_parallel_threshold=4 if enabled else None,
        )
        used.append([d.memory_stats()["bytes_in_use"] for d in jax.devices()[:2]])
        del engine
        gc.collect()
    for before, after in zip(*used, strict=True):
        assert abs(after - before) < 0.01 * before


def test_measured_crossover_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = shifting_engine(1, 2)
    found = first.runner.crossover
    assert found.tokens == (8, 16, 32)
    assert all(ms > 0 for ms in (*found.few_ms, *found.many_ms))
    assert answers(first) == expected()
    monkeypatch.setattr(ModelRunner, "_measure_crossover", lambda *_: pytest.fail("measured again"))
    assert shifting_engine(1, 2).runner.crossover == found
    (kept,) = (tmp_path / "arctic_jax" / "crossovers").iterdir()
    kept.write_text('{"tokens": [8]}')
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        shifting_engine(1, 2)


def test_the_crossover_is_where_the_layout_for_few_first_loses() -> None:
    of = Crossover.of
    assert of([8, 16, 32, 64], [1, 1, 3, 1], [2, 1, 2, 2]).threshold == 16
    assert of([8, 16], [3, 1], [2, 2]).threshold == 0
    assert of([8, 16], [1, 1], [2, 2]).threshold == 16


@pytest.mark.parametrize(
    ("tp", "sp", "heads", "kv_heads"),
    [
        (1, 4, 8, 1),  # one key/value head on four devices
        (2, 2, 8, 2),  # two on four
        (3, 2, 12, 6),  # no powers of two
        pytest.param(1, 8, 8, 4, marks=pytest.mark.slow),
        pytest.param(2, 3, 12, 2, marks=pytest.mark.slow),
    ],
)
def test_head_counts(tp: int, sp: int, heads: int, kv_heads: int) -> None:
    config = CONFIG | {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 96,
        "vocab_size": 61,
    }
    prompts = [[token % 61 for token in prompt] for prompt in PROMPTS[:3]]
    engine = shifting_engine(tp, sp, config, shift_parallel_threshold=4)
    assert answers(engine, prompts) == expected(config, prompts)


def test_weights_are_not_stored_twice() -> None:
    engine = shifting_engine(2, 2, shift_parallel_threshold=4)
    few, many = (engine.runner.leaves[layout] for layout in engine.runner.layouts)
    for fine, coarse in zip(few, many, strict=True):
        for view, whole in zip(fine.addressable_shards, coarse.addressable_shards, strict=True):
            offset = view.data.unsafe_buffer_pointer() - whole.data.unsafe_buffer_pointer()
            assert 0 <= offset <= whole.data.nbytes - view.data.nbytes


def test_collectives_of_the_programs() -> None:
    engine = shifting_engine(2, 2, shift_parallel_threshold=4)
    runner, layers = engine.runner, CONFIG["num_hidden_layers"]
    shards = {
        s.data.shape for ls in runner.leaves.values() for x in ls for s in x.addressable_shards
    }
    matrices = {",".join(map(str, shape)) for shape in shards if len(shape) > 1}
    for layout, bucket in runner.picker.steps:
        text = runner.programs.hlo(layout, bucket)
        count = Counter(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-permute)\(", text))
        # One reduction after the embedding and two a layer; one gather of the logits.
        if layout.name == "shift":
            assert count == {"all-reduce": 1 + 2 * layers, "all-gather": 1}
        else:
            assert count == {
                "all-to-all": 2 * layers,
                "all-reduce": 1 + 2 * layers,  # over tp
                "reduce-scatter": 1,  # the embedding's over sp: each device keeps its tokens
                "all-gather": 2,  # of the tokens, where the batch narrows, and of the logits
            }
        assert matrices.isdisjoint(re.findall(r"= f32\[([\d,]+)\]\S* copy\(", text))
    check_caches_are_updated_in_place(engine)


@settings(max_examples=200, deadline=None)
@given(
    threshold=st.integers(0, 80),
    sp=st.integers(1, 4),
    max_num_seqs=st.integers(1, 12),
    max_tokens=st.integers(1, 64),
    lengths=st.lists(st.integers(1, 64) | st.just(1), min_size=1, max_size=12),
    drafts=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    max_draft_len=st.integers(0, 5),
    on_device=st.booleans(),
    shall_draft=st.booleans(),
)
def test_every_step_has_a_program(
    threshold: int,
    sp: int,
    max_num_seqs: int,
    max_tokens: int,
    lengths: list[int],
    drafts: list[int],
    max_draft_len: int,
    on_device: bool,
    shall_draft: bool,
) -> None:
    """Also at the threshold and one past it; and few programs serve nobody."""
    few, many = shift(1, sp), ulysses(1, sp)
    rows = min(8, max_tokens)
    ladders = {
        layout: bucket_ladder(
            max_num_seqs, max_tokens, rows, multiple, max_draft_len, drafts_on_device=on_device
        )
        for layout, multiple in ((few, 1), (many, sp))
    }
    picker = LayoutPicker(ladders, threshold)
    lengths = lengths[:max_num_seqs]
    while sum(lengths) > max_tokens:
        lengths[lengths.index(max(lengths))] -= 1
    tokens, parts = max_tokens - sum(lengths), []
    for n, drafted in zip(lengths, drafts, strict=False):
        drafted = min(drafted, max_draft_len, tokens, rows)
        tokens, rows = tokens - drafted, rows - drafted
        if n:
            parts.append(
                ScheduledRequest(request_of(n), 0, n + drafted, 1 + drafted, True, drafted)
            )
    scheduled = ScheduledBatch(tuple(parts), drafts=shall_draft and on_device)
    if not scheduled.requests:
        return
    layout, bucket = picker.pick(scheduled)
    assert (layout == few) == (scheduled.num_tokens <= threshold or few == many)
    assert (layout, bucket) in picker.steps
    assert bucket.fits(scheduled)
    assert bucket == Bucket.fit(scheduled, ladders[layout])  # the threshold costs no padding
    decodes = scheduled.max_query_len == 1 and scheduled.num_rows == scheduled.num_tokens
    assert bucket.drafts == (scheduled.drafts or not (on_device and decodes))


def request_of(length: int) -> Request:
    return Request("r", 0, [0] * length, SamplingParams(temperature=0), 1)
