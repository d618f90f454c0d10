"""Speculators within the step program: what they draft, and that answers stay what they were."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file
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
    replay,
)
from swiftkv_model import swiftkv_config, swiftkv_tensors
from tiny_engine import CONFIG, TensorsInMemory, make_engine, make_tensors
from tiny_speculator import (
    LSTM,
    MLP,
    REDUCED,
    SHARING,
    make_speculator,
    plain_drafts,
    write_speculator,
)

from arctic_jax.config import ModelConfig
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.weight_loading import WeightLoader
from arctic_jax.loading.hub import SPECULATOR
from arctic_jax.loading.model_files import open_weights
from arctic_jax.models.layers import named_parameters
from arctic_jax.models.registry import model_class, speculator_class
from arctic_jax.progress import silent
from arctic_jax.request import CompletionOutput, Request
from arctic_jax.shift_parallel import make_mesh, shift, ulysses
from arctic_jax.spec_decode.proposer import build_proposer
from arctic_jax.training import speculator_checkpoint
from arctic_jax.training.forward import Batch, hidden_states, logits

VOCAB = CONFIG["vocab_size"]


def successors(answers: Sequence[Sequence[int]]) -> np.ndarray:
    """`[vocab, vocab]`, one in row v and column u if v came most often after u."""
    counts = np.zeros((VOCAB, VOCAB))
    for tokens in answers:
        np.add.at(counts, (tokens[1:], tokens[:-1]), 1)
    follows = np.zeros((VOCAB, VOCAB), np.float32)
    follows[counts.argmax(0), np.arange(VOCAB)] = 1
    return follows


def knowing_speculator(
    directory: Path, config: dict[str, Any], answers: Sequence[Sequence[int]]
) -> Path:
    """One that knows nothing but which token came after which: some of its drafts are right."""
    config = config | {"inner_dim": VOCAB, "tie_weights": True, "n_predict": 3}
    config |= {key: VOCAB for key in ("proj_dim", "emb_dim") if key in LSTM and "method" in config}
    made = make_speculator(config)
    tensors = {name: np.zeros_like(t) for name, t in made.items()}
    for name in tensors:
        if name.endswith("ln.0.weight"):
            tensors[name] += 1
        elif "emb" in name:
            tensors[name] += np.eye(VOCAB, dtype=np.float32)
        elif name == "head.0.weight":
            tensors[name] = successors(answers)[made.get("draft_token_ids", slice(None))]
        elif name == "draft_token_ids":
            tensors[name] = made[name]
    return write_speculator(directory, config, tensors)


def speculating(path: Path, *model: Any, more: dict[str, Any] = {}, **options: Any) -> EngineCore:  # noqa: B006
    config = {"method": "arctic", "model": str(path)} | more
    return make_engine(*model, speculative_config=config, **options)


class PlainModel:
    """The model on one whole sequence of at most 96 tokens."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        self.config: ModelConfig = model_class(config).config_from_hf(config)
        self.weights = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
        self._last = jax.jit(self._state)

    def state(self, token_ids: Sequence[int]) -> np.ndarray:
        """What the head takes after these tokens, `[1, hidden]`."""
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(token_ids)] = token_ids
        return np.asarray(self._last(padded, len(token_ids)))

    def _state(self, ids: jax.Array, length: jax.Array) -> jax.Array:
        batch = Batch(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids), jnp.ones_like(ids))
        return hidden_states(self.weights, self.config, batch).last[:, length - 1]

    def answers(self) -> list[list[int]]:
        """Greedy ones to all beginnings."""
        answers = []
        for prompt in BEGINNINGS:
            ids = list(prompt)
            while len(ids) < len(prompt) + 60:
                ids.append(int(logits(self.weights, self.config, self.state(ids)[0]).argmax()))
            answers.append(ids[len(prompt) :])
        return answers


@pytest.fixture(scope="module")
def cramped_hybrid(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    """Prompts come in chunks of a few tokens, and requests preempt each other all the time."""
    answers = PlainModel(CONFIG, make_tensors()).answers()
    path = knowing_speculator(tmp_path_factory.mktemp("lstm"), LSTM, answers)
    options = {"num_blocks": 26, "max_num_batched_tokens": 12, "max_num_mixed_tokens": 5}
    return speculating(path, more={"enable_suffix_decoding": True}, **options)


@pytest.fixture(scope="module")
def swiftkv_engine(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    config = swiftkv_config(2, 2, 4)
    model = config, swiftkv_tensors(config)
    path = knowing_speculator(tmp_path_factory.mktemp("mlp"), MLP, PlainModel(*model).answers())
    tensors = {f"speculator.{name}": t for name, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors")
    more = {"method": "mlp_speculator", "num_speculative_tokens": 2}
    return speculating(
        path, *model, more=more, num_blocks=26, max_num_seqs=2, max_num_batched_tokens=16
    )


@pytest.fixture(scope="module")
def two_layouts(tmp_path_factory: pytest.TempPathFactory) -> EngineCore:
    """With a speculator of random weights, that uses the model's own matrices."""
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices")
    path = write_speculator(tmp_path_factory.mktemp("random"), LSTM | SHARING)
    mesh = {"tensor_parallel_size": 2, "ulysses_sequence_parallel_size": 2}
    return speculating(
        path, **mesh, shift_parallel_threshold=6, max_num_seqs=2, max_num_batched_tokens=8
    )


@settings(SCHEDULES, max_examples=20)
@given(REQUESTS, ARRIVALS)
def test_any_schedule_of_the_hybrid(
    cramped_hybrid: EngineCore, requests: list, arrivals: list[int]
) -> None:
    check_any_schedule(cramped_hybrid, requests, arrivals, now_and_then(cramped_hybrid))


@settings(SCHEDULES, max_examples=20)
@given(REQUESTS, ARRIVALS)
def test_any_schedule_with_swiftkv(
    swiftkv_engine: EngineCore, requests: list, arrivals: list[int]
) -> None:
    check_any_schedule(swiftkv_engine, requests, arrivals, now_and_then(swiftkv_engine))


@pytest.mark.slow
@settings(SCHEDULES, max_examples=6)
@given(REQUESTS, ARRIVALS)
def test_any_schedule_in_both_layouts(
    two_layouts: EngineCore, requests: list, arrivals: list[int]
) -> None:
    check_any_schedule(two_layouts, requests, arrivals, now_and_then(two_layouts))


def check_right_drafts_are_accepted(engine: EngineCore, least: float) -> list[CompletionOutput]:
    """See that more than `least` of the drafted tokens are; return the answers without drafts."""
    requests = [(prompt, greedy(30)) for prompt in BEGINNINGS]
    plain = generate(engine, requests)
    proposer = build_proposer(replace(engine.config.speculative, adaptive=False))
    for actual, wanted in zip(generate(engine, requests, proposer), plain, strict=True):
        assert_equal(actual, wanted)
    drafted, accepted = proposer.stats.drafted.sum(), proposer.stats.accepted.sum()
    assert least * drafted < accepted < drafted
    return plain


@pytest.mark.parametrize("name", ["cramped_hybrid", "swiftkv_engine"])
def test_right_drafts_are_accepted(name: str, request: pytest.FixtureRequest) -> None:
    check_right_drafts_are_accepted(request.getfixturevalue(name), 0.2)


@pytest.mark.parametrize("name", ["cramped_hybrid", "swiftkv_engine"])
@pytest.mark.parametrize("length", [92, 93, 94, 95])
def test_answers_end_at_the_context_length(
    name: str, length: int, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(name)
    requests = [([3] * length, greedy(None))]
    plain = generate(engine, requests)
    assert len(plain[0].token_ids) == 96 - length
    proposer = build_proposer(replace(engine.config.speculative, adaptive=False))
    assert_equal(generate(engine, requests, proposer)[0], plain[0])


def test_the_device_drafts_from_the_row_that_was_accepted_last(two_layouts: EngineCore) -> None:
    requests = [(prompt[: 20 - i], greedy(16)) for i, prompt in enumerate(BEGINNINGS)]
    plain = generate(two_layouts, requests)

    def answers(request: Request) -> Sequence[int]:
        return plain[int(request.request_id)].token_ids

    proposer = Recorder(answers, rate=0.7)
    generate(two_layouts, requests, proposer)
    assert 0 < proposer.stats.accepted.sum() < proposer.stats.drafted.sum()
    assert len(proposer.drafted) > 20
    tensors = make_tensors()
    model = PlainModel(CONFIG, tensors)
    base = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    config = LSTM | SHARING
    for known, draft in proposer.drafted:
        state, token = model.state(known[:-1]), np.array(known[-1:])
        wanted, _ = plain_drafts(config, make_speculator(config), base, state, token)
        assert draft == wanted[0].tolist()


def test_a_reduced_head_changes_no_answer(tmp_path: Path) -> None:
    tp, sp = 2, 2
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    answers = PlainModel(CONFIG, make_tensors()).answers()
    path = knowing_speculator(tmp_path, LSTM | REDUCED, answers)
    engine = speculating(
        path,
        tensor_parallel_size=tp,
        ulysses_sequence_parallel_size=sp,
        shift_parallel_threshold=6,
        max_num_seqs=2,
    )
    plain = check_right_drafts_are_accepted(engine, 0.1)
    recorder = replay(plain, rate=0.7, kind=Recorder)
    assert isinstance(recorder, Recorder)
    generate(engine, [(prompt, greedy(30)) for prompt in BEGINNINGS], recorder)
    tokens = {token for _, draft in recorder.drafted for token in draft}
    assert len(tokens) > 5
    assert tokens.issubset(load_file(path / "model.safetensors")["draft_token_ids"].tolist())


def test_ids_are_not_rounded_as_weights_are() -> None:
    tp, sp = 2, 2
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    config = MLP | {"vocab_size": 1000, "draft_vocab_size": 500}
    cls, tensors = speculator_class(config), make_speculator(config)
    module = nnx.eval_shape(lambda: cls(cls.config_from_hf(config), tp * sp))
    layouts, bfloat16 = [shift(tp, sp), ulysses(tp, sp)], jnp.dtype("bfloat16")
    loader = WeightLoader(make_mesh(tp, sp), layouts, bfloat16, 0, silent)
    placed, _ = loader.load(module, TensorsInMemory(tensors), "a speculator")
    for layout in layouts:
        leaves = dict(zip(named_parameters(module), placed[layout], strict=True))
        for k in range(config["n_predict"]):
            np.testing.assert_array_equal(
                leaves.pop(f"heads.{k}.token_ids"), tensors["draft_token_ids"]
            )
        assert {array.dtype for array in leaves.values()} == {bfloat16}


def test_steps_that_shall_not_draft_do_not(swiftkv_engine: EngineCore) -> None:
    requests = [(BEGINNINGS[0], greedy(16))]
    (plain,) = generate(swiftkv_engine, requests)
    for wants in (False, True):
        proposer = replay([plain], rate=0.0, kind=Recorder)
        assert isinstance(proposer, Recorder)
        proposer.config = replace(proposer.config, hard_disable_by_batch_size=1)  # none verified
        proposer.wants_drafts = wants
        generate(swiftkv_engine, requests, proposer)
        _, *drafts = (draft for _, draft in proposer.drafted)  # without that of the prompt's step
        assert len(drafts) == 14
        assert all((-1 in draft) != wants for draft in drafts)


def test_as_many_tokens_as_are_wanted(swiftkv_engine: EngineCore) -> None:
    assert swiftkv_engine.config.speculative.max_draft_len == 2
    assert len(build_proposer(swiftkv_engine.config.speculative).stats.drafted) == 2


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"input_hidden_dim": 64}, {}, "'.*spec' was not made for the model 'smollm2.*64, not 32"),
        ({"architectures": ["LlamaForCausalLM"]}, {}, "not supported; supported: .*ArcticLSTM"),
        ({"draft_vocab_size": 98}, {}, "draft_vocab_size is 98, its vocab_size 97"),
        ({"draft_vocab_size": 3}, {}, r"int32 \(2,\), not integers \(3,\)"),
        ({"draft_vocab_size": 2}, {}, "tokens from 1 to 97, of a vocabulary of 97"),
        ({}, {"num_speculative_tokens": 4}, "=4, but the speculator '.*spec' drafts at most 3"),
    ],
)
def test_a_speculator_that_does_not_fit_is_refused(
    changes: dict, more: dict, message: str, tmp_path: Path
) -> None:
    tensors = {"draft_token_ids": np.array([1, 97], np.int32)}
    path = write_speculator(tmp_path / "spec", LSTM | changes, tensors)
    given = {"method": "arctic", "model": str(path)} | more
    with pytest.raises(ValueError, match=message):
        make_engine(speculative_config=given)


def test_the_shipped_speculator_has_what_its_config_says() -> None:
    config, checkpoint = open_weights(SPECULATOR, None, dummy=False)
    cls = speculator_class(config)
    speculator = nnx.eval_shape(lambda: cls(cls.config_from_hf(config), 1))
    wanted = speculator_checkpoint.initial_values(speculator, 0)
    wanted = speculator_checkpoint.checkpoint_tensors(speculator, wanted)
    assert checkpoint is not None
    assert {name: checkpoint.shape(name) for name in checkpoint} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    for name in checkpoint:
        assert np.isfinite(checkpoint.read(name).astype(np.float32)).all()
