"""A draft model within the step program: what it drafts, and that answers stay what they were."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import plain_model
import pytest
from hypothesis import given, settings
from speculation_cases import (
    ARRIVALS,
    BEGINNINGS,
    REQUESTS,
    SCHEDULES,
    Recorder,
    assert_equal,
    check_any_schedule,
    generate,
    greedy,
    now_and_then,
)
from swiftkv_model import swiftkv_config, swiftkv_tensors
from tiny_engine import (
    CONFIG,
    check_caches_are_updated_in_place,
    make_engine,
    make_tensors,
    write_files,
)

from arctic_jax.engine.core import EngineCore
from arctic_jax.request import Request
from arctic_jax.spec_decode.proposer import build_proposer

K = 3
SMALL = CONFIG | {  # three heads, which no two devices can share
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}


def similar(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights with which some drafts are right."""
    rng = np.random.default_rng(7)
    return {
        name: (tensor + 0.07 * tensor.std() * rng.normal(size=tensor.shape)).astype(np.float32)
        for name, tensor in tensors.items()
    }


def drafting(path: Path, *model: Any, more: dict[str, Any] = {}, **options: Any) -> EngineCore:  # noqa: B006
    config = {"method": "draft_model", "model": str(path), "num_speculative_tokens": K} | more
    return make_engine(*model, speculative_config=config, **options)


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    """Prompts come in chunks of a few tokens, and requests preempt each other all the time."""
    path = tmp_path_factory.mktemp("similar")
    write_files(path, CONFIG, similar(make_tensors()))
    options = {"num_blocks": 26, "max_num_batched_tokens": 12, "max_num_mixed_tokens": 5}
    return drafting(path, **options)


@pytest.fixture(scope="module")
def two_layouts(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices")
    path = write_files(tmp_path_factory.mktemp("small"), SMALL, make_tensors(SMALL, seed=4))
    mesh = {"tensor_parallel_size": 2, "ulysses_sequence_parallel_size": 2}
    options = {"shift_parallel_threshold": 6, "max_num_seqs": 2, "max_num_batched_tokens": 8}
    return drafting(path, **mesh, **options)


@pytest.fixture(scope="module")
def swiftkv_hybrid(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    """A SwiftKV student drafts for another, where suffix decoding is not sure of itself."""
    config = swiftkv_config(2, 2, 4)
    tensors = swiftkv_tensors(config)
    path = write_files(tmp_path_factory.mktemp("student"), config, similar(tensors))
    options = {"num_blocks": 26, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    return drafting(path, config, tensors, more={"enable_suffix_decoding": True}, **options)


def test_caches_are_updated_in_place(swiftkv_hybrid: EngineCore) -> None:
    check_caches_are_updated_in_place(swiftkv_hybrid)


@pytest.mark.parametrize(
    "name",
    [
        "cramped",
        pytest.param("two_layouts", marks=pytest.mark.slow),
        pytest.param("swiftkv_hybrid", marks=pytest.mark.slow),
    ],
)
def test_any_schedule(name: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(name)

    @settings(SCHEDULES, max_examples=3 if name == "two_layouts" else 8)
    @given(REQUESTS, ARRIVALS)
    def check(requests: list, arrivals: list[int]) -> None:
        check_any_schedule(engine, requests, arrivals, now_and_then(engine))

    check()


@pytest.mark.parametrize("name", ["cramped", pytest.param("two_layouts", marks=pytest.mark.slow)])
def test_drafts_are_what_the_draft_model_would_say(
    name: str, request: pytest.FixtureRequest
) -> None:
    """After every kind of step: wrong drafts, preemptions, cached prefixes. Within a block."""
    engine = request.getfixturevalue(name)
    requests = [(prompt[: 20 - i], greedy(16)) for i, prompt in enumerate(BEGINNINGS)]
    plain = generate(engine, requests)

    def answers(request: Request) -> Sequence[int]:
        return plain[int(request.request_id)].token_ids

    proposer = Recorder(answers, rate=0.7)
    generate(engine, requests, proposer)
    assert 0 < proposer.stats.accepted.sum() < proposer.stats.drafted.sum()
    config, tensors = CONFIG, similar(make_tensors())
    if name == "two_layouts":
        config, tensors = SMALL, make_tensors(SMALL, seed=4)
    size, compared = engine.config.cache.block_size, 0
    for known, draft in proposer.drafted[:60]:
        room = -(-(len(known) - 1) // size) * size
        certain = min(max(room - len(known) + 1, 0), K)
        assert len(draft) == K
        wanted = plain_model.greedy(config, tensors, known, certain)
        assert draft[:certain] == wanted
        compared += certain
    assert compared > 20


def test_the_model_itself_drafts_rightly(tmp_path: Path) -> None:
    """With prompts that share a prefix: its keys and values come from the cache, too."""
    tensors = make_tensors()
    path = write_files(tmp_path, CONFIG, tensors)
    sizes = {"block_size": 16, "num_blocks": 24, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    engine = drafting(path, **sizes)
    requests = [(BEGINNINGS[0] + [i], greedy(20)) for i in range(3)]
    plain = generate(engine, requests)
    proposer = build_proposer(replace(engine.config.speculative, adaptive=False))
    found = generate(engine, requests, proposer, arrivals=[0, 9, 9])
    for actual, wanted in zip(found, plain, strict=True):
        assert_equal(actual, wanted)
    drafted, accepted = proposer.stats.drafted.sum(), proposer.stats.accepted.sum()
    assert 20 < drafted * 0.85 < accepted  # the others passed the last block


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"vocab_size": 96}, "does not fit the model 'smollm2.*has 96 tokens, not 97"),
        (CONFIG | {"architectures": ["BertModel"]}, "'BertModel'.* not supported"),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused(
    config: dict, message: str, tmp_path: Path
) -> None:
    write_files(tmp_path, config, {"none": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=message):
        drafting(tmp_path)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, CONFIG, make_tensors())
    text = (tmp_path / "tokenizer.json").read_text()
    file = json.loads(text)
    vocab = file["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="its tokenizer numbers tokens in another way"):
        drafting(tmp_path)
