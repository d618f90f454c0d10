"""Every encoder against the hidden states of `transformers`; packed as well as alone."""

from collections.abc import Sequence
from pathlib import Path

import encoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from arctic_jax import weights
from arctic_jax.encoder_batch import EncoderBucket, pack, unpack
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.models.bert import BertModel
from arctic_jax.models.layers import named_parameters
from arctic_jax.models.registry import ENCODERS, encoder_class
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.shift_parallel import make_mesh
from arctic_jax.testing import write_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens" / "tiny_encoders.npz"
BERT = encoder_cases.CASES["bert"]


def load(
    directory: Path, config: dict, dtype: str = "float32", implementation: str | None = None
) -> BertModel:
    """The model alone: no engine."""
    cls = encoder_class(config)
    model = nnx.eval_shape(lambda: cls(cls.config_from_hf(config), implementation))
    parameters = {
        path: weights.ParameterSpec(variable.shape, jnp.dtype(dtype), PartitionSpec())
        for path, variable in named_parameters(model).items()
    }
    placed = weights.load(
        parameters, model.weight_sources(), SafetensorsCheckpoint(directory), make_mesh(1, 1)
    )
    return jax.tree.unflatten(jax.tree.structure(model), [array for _, array in placed])


def hidden_states(
    model: BertModel, windows: Sequence[Sequence[Sequence[int]]], bucket: EncoderBucket
) -> list[np.ndarray]:
    """Those of each sequence, in their order."""
    run = jax.jit(lambda model, packed: model(unpack(packed, bucket), bucket.window))
    packed = pack(windows, bucket)
    hidden, batch = np.asarray(run(model, packed)), unpack(packed, bucket)
    count = sum(map(len, windows))
    return [hidden[np.asarray(batch.segment_ids) == row] for row in range(count)]


@pytest.mark.parametrize("name", encoder_cases.CASES)
def test_hidden_states_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    goldens = np.load(GOLDENS)
    config = encoder_cases.CASES[name]
    model = load(write_checkpoint(tmp_path, config, encoder_cases.SEED), config)
    texts = [goldens[f"{name}/{length}/token_ids"] for length in encoder_cases.LENGTHS]
    expected = [goldens[f"{name}/{length}/hidden"] for length in encoder_cases.LENGTHS]
    packed = hidden_states(
        model, [texts[:1] + texts[2:3], texts[3:], texts[1:2]], EncoderBucket(48, 4)
    )
    for text, wanted, together in zip(
        texts, expected, [packed[0], packed[3], packed[1], packed[2]], strict=True
    ):
        (alone,) = hidden_states(model, [[text]], EncoderBucket(40, 1))
        np.testing.assert_allclose(alone, wanted, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(together, wanted, rtol=2e-4, atol=2e-4)


def test_every_architecture_has_a_case() -> None:
    known = {ENCODERS[case["architectures"][0]] for case in encoder_cases.CASES.values()}
    assert known == set(ENCODERS.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_size": 50}, "hidden_size 50"),
    ],
)
def test_what_is_not_implemented_is_named(change: dict, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        BertModel.config_from_hf(BERT | change)


def test_a_missing_key_is_named() -> None:
    config = {key: value for key, value in BERT.items() if key != "vocab_size"}
    with pytest.raises(UnsupportedModelError, match="vocab_size"):
        BertModel.config_from_hf(config)


def test_too_much_for_a_bucket_is_refused() -> None:
    bucket = EncoderBucket(16, 2)
    for windows in ([[range(17)]], [[[1]], [[1]], [[1]]], [[[1]] * 5]):
        with pytest.raises(ValueError, match="do not fit"):
            pack(windows, bucket)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_the_kernel_for_hopper_gives_the_same(name: str, tmp_path: Path) -> None:
    """In the interpreter: short texts side by side in a wide window, in bfloat16."""
    config = encoder_cases.CASES[name] | {"num_hidden_layers": 1, "max_position_embeddings": 128}
    config |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"head_dim": 32, "intermediate_size": 128}
    write_checkpoint(tmp_path, config)
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 90, n).tolist() for n in (1, 70, 30, 64)]
    found = []
    with dispatch.interpret():
        for implementation in ("xla", "mosaic_gpu"):
            model = load(tmp_path, config, "bfloat16", implementation)
            found.append(hidden_states(model, [texts[:3], texts[3:]], EncoderBucket(128, 2)))
    for want, got in zip(*found, strict=True):
        want, got = (rows.astype(np.float32) for rows in (want, got))
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(got, want, atol=0.06)
