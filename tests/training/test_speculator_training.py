"""Training a speculator: the loss, learning, resumption, and what is written."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tiny_engine import CONFIG, make_tensors
from tiny_speculator import CASES, make_speculator, plain_drafts

from arctic_jax import testing
from arctic_jax.config import LoadConfig
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.models.layers import named_parameters
from arctic_jax.models.registry import model_class, speculator_class
from arctic_jax.training import speculator_checkpoint
from arctic_jax.training.forward import Batch
from arctic_jax.training.speculator import Recipe, heads_losses, train, vocabulary
from arctic_jax.weights import RowBlocks, Rows


def module_of(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    """A speculator with these tensors, by its own sources; tables are not padded."""
    cls = speculator_class(config)
    made = nnx.eval_shape(lambda: cls(cls.config_from_hf(config), 1))
    sources = made.weight_sources()
    leaves = []
    for path in named_parameters(made):
        source = sources[path]
        assert isinstance(source, Rows | RowBlocks)
        leaves.append(jnp.asarray(np.concatenate([tensors[name] for name in source.names])))
    return jax.tree.unflatten(jax.tree.structure(made), leaves)


@pytest.mark.parametrize("name", ["lstm", "lstm_sharing", "mlp_tied"])
def test_the_loss_is_that_of_plain_numpy(name: str) -> None:
    """Two rows of packed sequences, of which some tokens are an answer's."""
    rng = np.random.default_rng(0)
    config, length = CASES[name], 14
    ids = rng.integers(0, CONFIG["vocab_size"], (2, length))
    hidden = rng.normal(size=(2, length, CONFIG["hidden_size"])).astype(np.float32)
    segments = np.array([[1] * 8 + [2] * 6, [1] * 12 + [0] * 2])
    counts = np.zeros((2, length), bool)  # a token's prediction of the one after it
    counts[0, 2:7] = counts[0, 8:13] = counts[1, 0:3] = counts[1, 5:11] = True
    batch = Batch(*map(jnp.asarray, (ids, np.zeros_like(ids), segments, counts)))
    tensors = make_speculator(config)
    base = make_tensors(CONFIG)
    numbers = model_class(CONFIG).config_from_hf(CONFIG)
    weights = {name: jnp.asarray(tensor) for name, tensor in base.items()}
    losses, accepted = jax.jit(heads_losses)(
        module_of(config, tensors), vocabulary(weights, numbers), jnp.asarray(hidden), batch
    )
    heads = config["n_predict"]
    wanted: list[list[float]] = [[] for _ in range(heads)]
    right: list[list[bool]] = [[] for _ in range(heads)]
    matrices = base["model.embed_tokens.weight"], base["lm_head.weight"]
    for b in range(2):
        for t in range(length):
            for k in range(heads):
                # From the state at t and tokens t + 1 … t + k + 1 to token t + k + 2.
                if t + k + 2 >= length or not counts[b, t : t + k + 2].all():
                    continue
                following = ids[b, t + 2 : t + k + 2]
                told = np.concatenate([following, np.zeros(heads - k, int)])[None]
                _, logits = plain_drafts(
                    config, tensors, matrices, hidden[b, t : t + 1], ids[b, t + 1 : t + 2], told
                )
                target = ids[b, t + k + 2]
                shifted = logits[0, k] - logits[0, k].max()
                wanted[k].append(np.log(np.exp(shifted).sum()) - shifted[target])
                said = logits[0, : k + 1].argmax(1)
                right[k].append(bool((said == ids[b, t + 2 : t + k + 3]).all()))
    assert min(map(len, wanted)) > 5
    np.testing.assert_allclose(losses, [np.mean(values) for values in wanted], rtol=1e-5)
    np.testing.assert_allclose(accepted, [np.mean(values) for values in right], atol=1e-6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dict(testing.TINY_LLAMA) | {"num_hidden_layers": 1, "max_position_embeddings": 128}
    return testing.write_model(tmp_path_factory.mktemp("base"), config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    rng = np.random.default_rng(0)
    lines = [{"text": " ".join(rng.choice(["red", "green", "one"], 8))} for _ in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_of(**changes: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "inner_size": 32,
        "steps": 40,
        "batch_size": 8,
        "max_length": 64,
        "learning_rate": 1e-2,
        "dtype": "float32",
        "save_every": 20,
    }
    return Recipe(**defaults | changes)


def lines_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_an_interrupted_run_goes_on_as_if_nothing_had_been(
    base: Path, text: Path, tmp_path: Path
) -> None:
    load = LoadConfig(model=str(base))
    count = train(load, text, tmp_path / "whole", recipe_of())
    whole = lines_of(tmp_path / "whole")
    assert whole[-1]["loss"] < 0.6 * whole[0]["loss"]
    assert whole[-1]["accepted_1"] > 0.6 > whole[0]["accepted_1"]
    assert whole[-1]["accepted_1"] >= whole[-1]["accepted_3"]
    assert whole[-1]["loss"] == pytest.approx(sum(whole[-1][f"loss_{k}"] for k in (1, 2, 3)))

    def interrupt(line: Any) -> None:
        if line["step"] == 26:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(load, text, tmp_path / "parts", recipe_of(), on_step=interrupt)
    saved = load_file(tmp_path / "parts" / "speculator" / "model.safetensors")
    assert 27 <= len(lines_of(tmp_path / "parts")) < 40
    assert train(load, text, tmp_path / "parts", recipe_of()) == count
    parts = lines_of(tmp_path / "parts")
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
    ended = load_file(tmp_path / "whole" / "speculator" / "model.safetensors")
    again = load_file(tmp_path / "parts" / "speculator" / "model.safetensors")
    assert ended.keys() == again.keys() == saved.keys()
    for name, tensor in ended.items():
        np.testing.assert_array_equal(tensor, again[name])
    assert any((ended[name] != saved[name]).any() for name in ended)
    with pytest.raises(ValueError, match=r"begun with other settings: .*'inner_size': \(32, 16\)"):
        train(load, text, tmp_path / "parts", recipe_of(inner_size=16))


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_what_is_written_can_be_read(kind: str, shares: bool) -> None:
    """By the published names and shapes; the vocabulary of 97 is padded within."""
    numbers = model_class(CONFIG).config_from_hf(CONFIG)
    config = speculator_checkpoint.speculator_config(numbers, kind, 24, 3, shares)
    cls = speculator_class(config)
    made = nnx.eval_shape(lambda: cls(cls.config_from_hf(config), 1))
    values = speculator_checkpoint.initial_values(made, 0)
    tensors = speculator_checkpoint.checkpoint_tensors(made, values)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {name: tensor.shape for name, tensor in make_speculator(config).items()}
    sources = made.weight_sources()
    for path, value in values.items():
        names = sources[path].names
        whole = np.concatenate([tensors[name] for name in names])
        np.testing.assert_array_equal(whole, value[: len(whole)])


def test_a_speculator_of_smollm2_is_small_enough_to_ship() -> None:
    smollm2 = CONFIG | {"hidden_size": 576, "vocab_size": 49152, "head_dim": 64}
    numbers = model_class(smollm2).config_from_hf(smollm2)
    recipe = Recipe()
    config = speculator_checkpoint.speculator_config(
        numbers, recipe.kind, recipe.inner_size, recipe.n_predict, recipe.shares
    )
    cls = speculator_class(config)
    made = nnx.eval_shape(lambda: cls(cls.config_from_hf(config), 1))
    size = sum(p.size for p in named_parameters(made).values())
    assert size == 4 * 1024 * (576 + 1024 + 576) + 1024 * 576 + 4 * 1024
    assert 2 * size < 20e6


def test_models_that_training_cannot_run_are_refused(text: Path, tmp_path: Path) -> None:
    config = dict(testing.TINY_LLAMA) | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
    model = testing.write_model(tmp_path / "qwen3", config)
    with pytest.raises(UnsupportedModelError, match=r"speculators of \['Qwen3ForCausalLM'\]"):
        train(LoadConfig(model=str(model)), text, tmp_path / "out", recipe_of())
