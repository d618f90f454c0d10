"""SwiftKV, the model alone: against the plain forward that runs every layer on every token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_model
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swiftkv_model import (
    UNWRITTEN,
    Chunk,
    Steps,
    load_model,
    prompt_of,
    swiftkv_config,
    swiftkv_tensors,
)
from tiny_engine import CONFIG, make_tensors

from arctic_jax.errors import CheckpointError, UnsupportedModelError
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.models.llama_swiftkv import LlamaSwiftKVForCausalLM
from arctic_jax.models.registry import model_class
from arctic_jax.pallas_kernels.kv_cache_update import kv_cache_update
from arctic_jax.pallas_kernels.linear import linear

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QWEN2 = {"architectures": ["Qwen2SwiftKVForCausalLM"], "model_type": "qwen2_swiftkv"}
CASES: dict[str, dict[str, Any]] = {
    "half": swiftkv_config(2),
    "one_lower_layer": swiftkv_config(1),
    "one_upper_layer": swiftkv_config(3),
    "across_2": swiftkv_config(2, 2),
    "across_4": swiftkv_config(2, 4, layers=6),
    "across_2_of_4": swiftkv_config(2, 2, layers=6),
    "attention_bias": swiftkv_config(2, attention_bias=True),
    "attention_bias_across_2": swiftkv_config(2, 2, attention_bias=True),
    "tied": swiftkv_config(2, tie_word_embeddings=True),
    "llama31_rope": swiftkv_config(2, rope_scaling=LLAMA31),
    "head_dim_10": swiftkv_config(2, head_dim=10),
    "multi_query": swiftkv_config(2, num_key_value_heads=1),
    "qwen2": swiftkv_config(2, **QWEN2),
    "qwen2_across_2_tied": swiftkv_config(2, 2, **QWEN2, tie_word_embeddings=True),
}
PROMPT = prompt_of(40)


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def steps_of(config: dict, block_size: int = 16) -> Steps:
    return Steps(load_model(config, swiftkv_tensors(config)), 96 // block_size, block_size)


def plain(config: dict, prompt: list[int] = PROMPT) -> np.ndarray:
    return plain_model.logits(config, swiftkv_tensors(config), prompt)


@pytest.mark.parametrize(
    ("name", "block_size"), [*((name, 16) for name in CASES), ("half", 32), ("across_2", 32)]
)
def test_the_last_row_of_a_prompt(name: str, block_size: int) -> None:
    steps = steps_of(CASES[name], block_size)
    (logits,) = steps.run([Chunk(PROMPT, 0, 1, [2, 0, 1])])
    assert_close(logits, plain(CASES[name])[-1:])


@pytest.mark.parametrize("name", CASES)
def test_all_rows(name: str) -> None:
    """Every token survives: the same as if nothing had been left out."""
    (logits,) = steps_of(CASES[name]).run([Chunk(PROMPT, 0, len(PROMPT), [2, 0, 1])])
    assert_close(logits, plain(CASES[name]))


def test_pure_decode() -> None:
    """One token a step, each with a row: the upper layers see them all, one by one."""
    config, prompts = swiftkv_config(2, 2), [prompt_of(9, 1), prompt_of(9, 2)]
    steps = steps_of(config)
    for i in range(9):
        rows = steps.run([Chunk([p[i]], i, 1, [s]) for s, p in enumerate(prompts)], padding=3)
        for row, prompt in zip(rows, prompts, strict=True):
            assert_close(row[0], plain(config, prompt)[i])


@pytest.mark.parametrize("architecture", ["LlamaSwiftKVForCausalLM", "Qwen2SwiftKVForCausalLM"])
def test_without_upper_layers_it_is_the_base_model(architecture: str) -> None:
    config = swiftkv_config(4, architectures=[architecture])
    base = config | {"architectures": [architecture.replace("SwiftKV", "")]}
    tensors = swiftkv_tensors(config)
    models = [load_model(c, tensors) for c in (config, base)]
    assert isinstance(models[0], LlamaSwiftKVForCausalLM)
    assert not isinstance(models[1], LlamaSwiftKVForCausalLM)
    ours, bases = (Steps(m, 6, 16).run([Chunk(PROMPT, 0, 3, [0, 1, 2])])[0] for m in models)
    np.testing.assert_array_equal(ours, bases)
    # The plain model reads the same tensors as an ordinary model.
    expected = plain_model.logits(base | {"num_key_value_layers": 4}, tensors, PROMPT)
    assert_close(ours, expected[-3:])


def test_it_is_not_the_base_model_otherwise() -> None:
    """The reference would not notice a wrong rule if the rule made no difference."""
    config = swiftkv_config(2)
    tensors = swiftkv_tensors(config)
    base = {k.replace("_swiftkv", ""): v for k, v in tensors.items()}
    ordinary = plain_model.logits({**config, "num_key_value_layers": 4}, base, PROMPT)
    assert np.abs(ordinary[-1] - plain(config)[-1]).max() > 0.1


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 5, 16, 17]), min_size=1, max_size=6),
    group=st.sampled_from([1, 2]),
    rows=st.integers(0, 1),
)
def test_any_chunks_give_the_same(sizes: list[int], group: int, rows: int) -> None:
    """Also chunks that end with a block, a last one of one token, and those without a row."""
    config, prompt, start = swiftkv_config(2, group), PROMPT[: sum(sizes)], 0
    steps, logits = steps_of(config), np.empty(0)
    for size in sizes:
        end = min(start + size, len(prompt))
        last = end == len(prompt)
        chunk = Chunk(prompt[start:end], start, 1 if last else rows, [3, 1, 2])
        (logits,) = steps.run([chunk], padding=2)
        start = end
        if last:
            break
    assert_close(logits, plain(config, prompt)[-1:])


def test_rows_of_drafts() -> None:
    """Verification: 1 + k rows a sequence, ragged, k = 0 among them; and a chunk without a row."""
    config, known = swiftkv_config(2, 2), 20
    prompts, drafts = [prompt_of(30, seed) for seed in range(4)], [3, 0, 5, 1]
    steps = steps_of(config)
    blocks = [[0, 1], [2, 3], [4, 5], [6, 7]]
    steps.clear(8)
    steps.run([Chunk(p[:known], 0, 1, b) for p, b in zip(prompts, blocks, strict=True)])
    chunks = [
        Chunk(p[known : known + 1 + k], known, 1 + k, b)
        for p, k, b in zip(prompts, drafts, blocks, strict=True)
    ]
    chunks[3] = Chunk(prompts[3][known:27], known, 0, blocks[3])
    for prompt, k, logits in zip(prompts[:3], drafts[:3], steps.run(chunks), strict=False):
        expected = plain(config, prompt)[known : known + 1 + k]
        assert_close(logits, expected)


def test_padding_changes_nothing() -> None:
    """Slots of -1 write nothing, rows of -1 attend to nothing."""
    config = swiftkv_config(2)
    alone, padded = steps_of(config), steps_of(config)
    (one,) = alone.run([Chunk(PROMPT, 0, 1, [2, 0, 1])])
    (other,) = padded.run([Chunk(PROMPT, 0, 1, [2, 0, 1])], padding=7)
    assert_close(one, other, 1e-6)
    for a, b in zip(jax.tree.leaves(alone.cache), jax.tree.leaves(padded.cache), strict=True):
        assert_close(a, b, 1e-6)
        assert (b[:, 3:] == UNWRITTEN).all()
        assert (b[:, 1, :, 8:] == UNWRITTEN).all()
        assert (b[:, 1, :, :8] != UNWRITTEN).all()


@pytest.mark.parametrize("group", [1, 2])
def test_the_bulk_write_equals_writes_of_single_layers(group: int) -> None:
    config = swiftkv_config(2, group, layers=6, attention_bias=True)
    model = load_model(config, swiftkv_tensors(config))
    assert isinstance(model, LlamaSwiftKVForCausalLM)
    upper = model.upper_kv
    assert upper is not None
    steps = Steps(model, 6, 16)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, CONFIG["hidden_size"])), jnp.float32)
    angles = rng.uniform(size=(5, CONFIG["head_dim"] // 2))
    rope = jnp.cos(angles), jnp.sin(angles)
    batch = _SlotsOnly(jnp.array([3, -1, 40, 41, 95]))
    bulk = upper(x, rope, batch, steps.cache)
    layers = upper.weight.shape[1]
    assert layers == 4 // group
    for i in range(layers):
        one = linear(upper.norm(x), upper.weight[:, i], upper.bias[:, i], gated=False)
        one = one.reshape(5, -1, 1, 2, CONFIG["head_dim"])
        before, layer = steps.cache, jnp.int32(2 + i)
        _, k, v = kv_cache_update(one, *rope, before.k, before.v, layer, batch.slot_mapping)
        assert_close(bulk.k[2 + i], k[2 + i], 1e-6)
        assert_close(bulk.v[2 + i], v[2 + i], 1e-6)
        written = (np.asarray(k[2 + i]) != UNWRITTEN).any(axis=(1, 3)).reshape(-1)
        assert np.flatnonzero(written).tolist() == [3, 40, 41, 95]
    assert (bulk.k[:2] == UNWRITTEN).all()
    assert (bulk.v[:2] == UNWRITTEN).all()


class _SlotsOnly:
    def __init__(self, slot_mapping: jax.Array) -> None:
        self.slot_mapping = slot_mapping


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((2, 3), r"num_hidden_layers 4 - num_key_value_layers 2 = 2 .* key_value_group_size 3"),
        ((1, 2), r"num_hidden_layers 4 - num_key_value_layers 1 = 3 .* key_value_group_size 2"),
        ((0, 1), r"num_key_value_layers 0 is not between 1 and num_hidden_layers 4"),
        ((5, 1), r"num_key_value_layers 5 is not between 1 and num_hidden_layers 4"),
    ],
)
def test_numbers_that_do_not_fit_are_named(numbers: tuple[int, int], message: str) -> None:
    config = swiftkv_config(*numbers)
    with pytest.raises(UnsupportedModelError, match=message):
        model_class(config).config_from_hf(config)


def test_a_config_without_the_numbers_has_no_upper_layers() -> None:
    config = swiftkv_config(2)
    del config["num_key_value_layers"], config["key_value_group_size"]
    read = model_class(config).config_from_hf(config)
    assert (read.num_lower_layers, read.num_cache_layers, read.key_value_group_size) == (4, 4, 1)


@pytest.mark.parametrize(("group", "layers"), [(1, 4), (2, 3)])
def test_only_leaders_own_keys_and_values(group: int, layers: int) -> None:
    config = swiftkv_config(2, group)
    assert model_class(config).config_from_hf(config).num_cache_layers == layers
    tensors = swiftkv_tensors(config)
    assert ("model.layers.3.self_attn.k_proj_swiftkv.weight" in tensors) == (group == 1)
    assert "model.layers.2.self_attn.k_proj.weight" not in tensors


def test_a_missing_tensor_is_named() -> None:
    config = swiftkv_config(2)
    tensors = swiftkv_tensors(config)
    del tensors["model.norm_swiftkv.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm_swiftkv\.weight"):
        load_model(config, tensors)


def test_the_base_model_has_no_upper_layers() -> None:
    model = load_model(CONFIG, make_tensors())
    assert type(model) is LlamaForCausalLM
    assert model.config.num_cache_layers == CONFIG["num_hidden_layers"]
