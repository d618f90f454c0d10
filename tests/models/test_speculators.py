"""Speculators' arithmetic and checkpoints, against plain numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny_engine import CONFIG, TensorsInMemory, make_tensors
from tiny_speculator import (
    CASES,
    GATES,
    LSTM,
    MLP,
    REDUCED,
    gelu,
    make_speculator,
    norm,
    plain_drafts,
)

from arctic_jax import weights
from arctic_jax.errors import CheckpointError, UnsupportedModelError
from arctic_jax.models.layers import Embed, dtype_of, named_parameters
from arctic_jax.models.lstm_speculator import lstm_cell
from arctic_jax.models.registry import model_class, speculator_class
from arctic_jax.models.speculator import Speculator, SpeculatorConfig, SpeculatorNorm, Vocabulary
from arctic_jax.shift_parallel import MeshLayout, make_mesh, shift, ulysses

BASE = make_tensors(CONFIG)
MATRICES = BASE["model.embed_tokens.weight"], BASE["lm_head.weight"]


class Loaded:
    """A speculator and a model's matrices on a mesh."""

    def __init__(self, config: dict[str, Any], layout: MeshLayout, mesh: Any) -> None:
        cls = speculator_class(config)
        self.config = cls.config_from_hf(config)
        self.mesh, self.layout = mesh, layout
        speculator = nnx.eval_shape(lambda: cls(self.config, mesh.size))
        self.speculator = self.place(
            speculator, speculator.weight_sources(), make_speculator(config)
        )
        vocab, hidden = MATRICES[0].shape
        base = nnx.eval_shape(
            lambda: Vocabulary(Embed(vocab, hidden, mesh.size), Embed(vocab, hidden, mesh.size))
        )
        names = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
        sources = {path: weights.Rows(name) for path, name in names.items()}
        self.base = self.place(base, sources, BASE)

    def place(self, module: Any, sources: Any, tensors: dict[str, np.ndarray]) -> Any:
        specs = {
            path: weights.ParameterSpec(
                parameter.shape,
                dtype_of(parameter, np.dtype(np.float32)),
                self.layout.partition(parameter.get_metadata("axis")),
            )
            for path, parameter in named_parameters(module).items()
        }
        placed = weights.load(specs, sources, TensorsInMemory(tensors), self.mesh)
        return jax.tree.unflatten(jax.tree.structure(module), [array for _, array in placed])

    def drafts(self, hidden: np.ndarray, tokens: np.ndarray, count: int | None = None) -> Any:
        where = jax.tree.map(
            lambda x: x.sharding.spec,
            (self.speculator, self.base),
            is_leaf=jax.Array.__instancecheck__,
        )
        run = jax.shard_map(
            lambda s, b, h, t: s(h, t, b, self.layout, count),
            mesh=self.mesh,
            in_specs=(*where, PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return np.asarray(
            jax.jit(run)(self.speculator, self.base, *jax.device_put((hidden, tokens), replicated))
        )


def inputs(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, CONFIG["hidden_size"])).astype(np.float32)
    return hidden, rng.integers(0, CONFIG["vocab_size"], rows).astype(np.int32)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_drafts_are_those_of_plain_numpy(config: dict) -> None:
    loaded = Loaded(config, shift(1, 1), make_mesh(1, 1))
    hidden, tokens = inputs(33)
    wanted, logits = plain_drafts(config, make_speculator(config), MATRICES, hidden, tokens)
    best = np.sort(logits, axis=-1)
    assert (best[..., -1] - best[..., -2]).min() > 1e-5  # no near ties: equality means something
    np.testing.assert_array_equal(loaded.drafts(hidden, tokens), wanted)
    np.testing.assert_array_equal(loaded.drafts(hidden, tokens, 1), wanted[:, :1])


@pytest.mark.parametrize(("make", "tp", "sp"), [(ulysses, 2, 2), (shift, 1, 8)])
@pytest.mark.parametrize("name", ["lstm", "lstm_sharing", "lstm_reduced", "mlp", "mlp_reduced"])
def test_any_mesh_drafts_the_same(name: str, tp: int, sp: int, make: Any) -> None:
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    loaded = Loaded(CASES[name], make(tp, sp), make_mesh(tp, sp))
    hidden, tokens = inputs(5)
    wanted, _ = plain_drafts(CASES[name], make_speculator(CASES[name]), MATRICES, hidden, tokens)
    np.testing.assert_array_equal(loaded.drafts(hidden, tokens), wanted)


def test_logits_are_those_of_plain_numpy() -> None:
    for config in (CASES["lstm_sharing"], CASES["mlp_tied"]):
        loaded = Loaded(config, shift(1, 1), make_mesh(1, 1))
        hidden, tokens = inputs(4)
        speculator, base, layout = loaded.speculator, loaded.base, loaded.layout
        _, wanted = plain_drafts(config, make_speculator(config), MATRICES, hidden, tokens)
        embedded = speculator.embeds[0](jnp.asarray(tokens), base, layout)
        x, _ = speculator.advance(0, speculator.start(jnp.asarray(hidden)), embedded)
        logits = speculator.heads[0].logits(x, base, layout)
        np.testing.assert_allclose(logits, wanted[:, 0], atol=3e-5)


def test_constants_of_the_published_speculators() -> None:
    config = SpeculatorConfig("a", 4096, 4096, 128256, 3)
    assert config.state_weight == pytest.approx(0.890899, abs=1e-6)
    assert config.token_scale == pytest.approx(23.072, abs=1e-3)


def test_token_ids_out_of_range_are_clamped() -> None:
    loaded = Loaded(LSTM, shift(1, 1), make_mesh(1, 1))
    hidden, _ = inputs(2)
    wild = loaded.drafts(hidden, np.array([-1, 10**6], np.int32))
    tame = loaded.drafts(hidden, np.array([0, CONFIG["vocab_size"] - 1], np.int32))
    np.testing.assert_array_equal(wild, tame)


def test_padded_columns_are_never_drafted() -> None:
    """All logits are negative, and those of the padding zero."""
    tensors = make_speculator(LSTM)
    loaded = Loaded(LSTM, shift(1, 1), make_mesh(1, 1))
    hidden, _ = inputs(8)
    table = loaded.speculator.heads[0].table
    x = np.abs(hidden[:, :24]) + 0.1
    rows = -np.abs(tensors["head.0.weight"])
    table.weight[...] = jnp.asarray(np.pad(rows, ((0, table.weight.shape[0] - len(rows)), (0, 0))))
    found = np.asarray(table.likeliest(jnp.asarray(x), loaded.layout))
    np.testing.assert_array_equal(found, (x @ rows.T).argmax(1))


def test_the_cell_rounds_as_the_original_does() -> None:
    """The cell is kept in bfloat16; the mean square of its norm is that before rounding."""
    rng = np.random.default_rng(0)
    inner = 64
    gates = rng.normal(size=(6, 4 * inner)).astype(np.float32) * 2
    cell = jnp.asarray(rng.normal(size=(6, inner)), jnp.bfloat16)
    values = {
        f"{n}.{k}": rng.normal(size=inner) for n in ("cell", "state") for k in ("weight", "bias")
    }
    norms = {}
    for name in ("cell", "state"):
        norms[name] = SpeculatorNorm(inner)
        norms[name].weight[...] = jnp.asarray(values[f"{name}.weight"], jnp.float32)
        norms[name].bias[...] = jnp.asarray(values[f"{name}.bias"], jnp.float32)
    state, kept = lstm_cell(jnp.asarray(gates), cell, norms["cell"], norms["state"])
    assert state.dtype == kept.dtype == jnp.bfloat16
    f, i, o, c = np.split(gates.astype(np.float64), 4, axis=1)
    f, i, o = (1 / (1 + np.exp(-x)) for x in (f, i, o))
    exact = f * np.asarray(cell, np.float64) + i * gelu(norm(values, "cell", c))
    rounded = np.asarray(kept, np.float64)
    np.testing.assert_allclose(rounded, exact, rtol=2**-8, atol=1e-6)
    scale = np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6)
    wanted = o * gelu(rounded / scale * values["state.weight"] + values["state.bias"])
    # One unit in the last place of bfloat16; by the rounded cell's mean square it would be more.
    np.testing.assert_allclose(np.asarray(state, np.float64), wanted, rtol=2**-8, atol=1e-6)


def test_all_forms_of_dimensions_and_a_prefix() -> None:
    whole = LSTM | {"inner_dim": 24, "proj_dim": "24", "emb_dim": ["24"]}
    cls = speculator_class(LSTM)
    assert cls.config_from_hf(whole) == cls.config_from_hf(LSTM)
    tensors = {f"speculator.{name}": tensor for name, tensor in make_speculator(LSTM).items()}
    checkpoint = weights.Renamed(TensorsInMemory(tensors), "speculator.")
    assert set(checkpoint) == set(make_speculator(LSTM))
    projection = cls(cls.config_from_hf(LSTM), 1).weight_sources()["projections.0"]
    rows = projection.read(checkpoint, 20, 60)
    parts = [tensors[f"speculator.{gate}_proj.0.weight"] for gate in GATES]
    np.testing.assert_array_equal(rows, np.concatenate(parts)[20:60])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LSTM | {"method": "sum_rnn"}, "'sum_rnn' is not supported"),
        (LSTM | {"inner_dim": "24.24"}, "inner_dim='24.24', a stack"),
        (LSTM | {"emb_dim": 16}, "emb_dim=16 is not supported"),
        ({k: v for k, v in LSTM.items() if k != "n_predict"}, "no key 'n_predict'"),
        (LSTM | {"n_predict": 0}, "n_predict is 0"),
        (LSTM | {"draft_vocab_size": 98}, "draft_vocab_size is 98, its vocab_size 97"),
        (LSTM | {"draft_vocab_size": 0}, "draft_vocab_size is 0,"),
        (CASES["lstm_sharing_head"] | REDUCED, "draft_vocab_size=83 cannot share a head"),
        (MLP | {"architectures": ["MLPSpeculatorPreTrainedModel"] * 2}, "one architecture"),
        (MLP | {"architectures": "MLPSpeculatorPreTrainedModel"}, "not supported"),
        (MLP | {"architectures": ["LlamaForCausalLM"]}, "supported: .*ArcticLSTM"),
    ],
)
def test_configs_that_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        speculator_class(config).config_from_hf(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_hidden_dim": 64}, "hidden states of 64, not 32"),
        ({"vocab_size": 96}, "a vocabulary of 96, not 97"),
        ({"base_model_archs": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM, not LlamaForCausalLM"),
    ],
)
def test_a_speculator_of_another_model_is_refused(changes: dict, message: str) -> None:
    config = speculator_class(LSTM).config_from_hf(LSTM | changes)
    base = model_class(CONFIG).config_from_hf(CONFIG)
    with pytest.raises(UnsupportedModelError, match=f"'spec'.*'base'.*{message}"):
        config.check_base(base, "spec", "base")


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (np.arange(82, dtype=np.int32), r"int32 \(82,\), not integers \(83,\)"),
        (np.arange(83, dtype=np.float32), r"float32 \(83,\), not integers"),
        (np.arange(15, 98, dtype=np.int32), "from 15 to 97, of a vocabulary of 97"),
        (np.arange(-1, 82, dtype=np.int32), "from -1 to 81, of a vocabulary of 97"),
    ],
)
def test_ids_that_are_not_those_of_the_rows_are_refused(
    token_ids: np.ndarray, message: str
) -> None:
    config = speculator_class(LSTM).config_from_hf(LSTM | REDUCED)
    with pytest.raises(UnsupportedModelError, match=message):
        config.check_draft_token_ids(token_ids)
    config.check_draft_token_ids(np.arange(14, 97, dtype=np.int32))


def test_students_may_use_the_speculator_of_their_base_model() -> None:
    config = speculator_class(LSTM).config_from_hf(LSTM)
    student = CONFIG | {"architectures": ["LlamaSwiftKVForCausalLM"], "num_key_value_layers": 1}
    config.check_base(model_class(student).config_from_hf(student), "spec", "base")


def test_a_checkpoint_that_lacks_a_tensor_is_refused() -> None:
    cls = speculator_class(LSTM)
    speculator: Speculator = nnx.eval_shape(lambda: cls(cls.config_from_hf(LSTM), 1))
    tensors = make_speculator(LSTM)
    del tensors["cell_ln.0.bias"]
    specs = {
        path: weights.ParameterSpec(p.shape, np.dtype(np.float32), PartitionSpec())
        for path, p in named_parameters(speculator).items()
    }
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor\(s\): cell_ln.0.bias"):
        weights.load(specs, speculator.weight_sources(), TensorsInMemory(tensors), make_mesh(1, 1))
