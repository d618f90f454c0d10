"""GGUF files written here with the `gguf` library, read back in Hugging Face's names."""

import contextlib
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from arctic_jax.config import ModelConfig
from arctic_jax.errors import CheckpointError, UnsupportedModelError
from arctic_jax.loading.gguf_checkpoint import QUANTIZATIONS, GGUFCheckpoint, llama3_scaling
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.testing import gguf_name, write_checkpoint, write_gguf

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 64


def config(architecture: str = "Llama", **changes: Any) -> dict[str, Any]:
    base = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": 40,
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
    }
    return base | changes


def write(path: Path, source: SafetensorsCheckpoint, kind: str = "F32", **options: Any) -> Path:
    return write_gguf(path, source.directory, kind, encode=quantized, **options)


def quantized(tensor: np.ndarray, kind: Type) -> np.ndarray:
    if kind not in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        return gguf.quantize(tensor, kind)
    # The library reads these but cannot make them: any bytes are a block, if its scales are finite.
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.RandomState(int(kind))
    blocks = random.randint(0, 256, (tensor.size // block, size), dtype="uint8")
    halves = random.uniform(0.001, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind == Type.Q6_K:
        blocks[:, 208:210] = halves[:, :2]
    else:
        blocks[:, 0:4] = halves
    return blocks.reshape(tensor.shape[0], -1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(write_checkpoint(tmp_path_factory.mktemp("llama"), config()))


@pytest.fixture(scope="module")
def llama_gguf(llama: SafetensorsCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", llama)


def test_names_shapes_and_values_are_hugging_faces(llama, llama_gguf):
    read = GGUFCheckpoint(llama_gguf)
    assert set(read) == set(llama)
    for name in llama:
        assert read.shape(name) == llama.shape(name)
        np.testing.assert_array_equal(read.read(name), llama.read(name), err_msg=name)
    assert "model.layers.2.mlp.up_proj.weight" not in read


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(30, 97), slice(64, 128), slice(5, 5)])
def test_a_range_of_rows_is_unpermuted_too(llama, llama_gguf, projection, rows):
    name = f"model.layers.1.self_attn.{projection}.weight"
    columns = slice(3, 77)
    read = GGUFCheckpoint(llama_gguf).read(name, rows, columns)
    np.testing.assert_array_equal(read, llama.read(name)[rows, columns])


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_quantization_by_rows_and_columns(llama, tmp_path, kind):
    path = write(tmp_path / "q.gguf", llama, kind=kind)
    read, reader = GGUFCheckpoint(path), gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        tensor = stored[gguf_name(name)]
        whole = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(whole).all()
        assert read.shape(name) == whole.shape
        for rows, columns in (
            (slice(None), slice(None)),
            (slice(3, 20), slice(None)),
            (slice(None), slice(31, 129)),
            (slice(7, 8), slice(128, 256)),
            (slice(4, 4), slice(None)),
            (slice(None), slice(9, 9)),
        ):
            part = read.read(name, rows, columns)
            np.testing.assert_array_equal(part.astype(np.float32), whole[rows, columns])


def test_permutation_of_quantized_rows(llama, tmp_path):
    path = write(tmp_path / "q.gguf", llama, kind="Q8_0")
    for projection in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{projection}.weight"
        expected = gguf.dequantize(gguf.quantize(llama.read(name), Type.Q8_0), Type.Q8_0)
        np.testing.assert_array_equal(
            GGUFCheckpoint(path).read(name, slice(10, 90)), expected[10:90]
        )


def test_biases(tmp_path):
    source = SafetensorsCheckpoint(
        write_checkpoint(tmp_path, config(attention_bias=True, mlp_bias=True))
    )
    read = GGUFCheckpoint(write(tmp_path / "b.gguf", source))
    for name in source:
        if name.endswith("bias"):
            np.testing.assert_array_equal(read.read(name), source.read(name), err_msg=name)
            np.testing.assert_array_equal(
                read.read(name, slice(5, 70)), source.read(name)[5:70], err_msg=name
            )
    assert read.config()["attention_bias"]
    assert read.config()["mlp_bias"]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_are_not_permuted(tmp_path, architecture):
    source = SafetensorsCheckpoint(write_checkpoint(tmp_path, config(architecture.capitalize())))
    read = GGUFCheckpoint(write(tmp_path / "q.gguf", source))
    assert set(read) == set(source)
    for name in source:
        np.testing.assert_array_equal(read.read(name), source.read(name), err_msg=name)
    assert read.config()["architectures"] == [f"{architecture.capitalize()}ForCausalLM"]


def test_config(llama, llama_gguf):
    read = GGUFCheckpoint(llama_gguf).config()
    expected = config() | {"dtype": "float32"}
    expected["rope_parameters"] = {"rope_type": "default", "rope_theta": expected.pop("rope_theta")}
    assert {key: read[key] for key in expected} == expected
    assert (read["bos_token_id"], read["eos_token_id"]) == (1, 2)
    model = ModelConfig.from_hf(read)
    assert (model.head_dim, model.rope.theta, model.rms_norm_eps) == (HEAD_DIM, 5000.0, 1e-5)


def test_config_of_tied_embeddings_and_dtype(tmp_path):
    source = SafetensorsCheckpoint(write_checkpoint(tmp_path, config(tie_word_embeddings=True)))
    read = GGUFCheckpoint(write(tmp_path / "t.gguf", source, kind="BF16")).config()
    assert read["tie_word_embeddings"]
    assert read["dtype"] == "bfloat16"


def test_sliding_window_makes_it_mistral(llama, tmp_path):
    path = write(tmp_path / "m.gguf", llama, keys={"attention.sliding_window": 32})
    read = GGUFCheckpoint(path).config()
    assert read["architectures"] == ["MistralForCausalLM"]
    assert read["sliding_window"] == 32


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 16,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
    ],
)
def test_rope_scaling(llama, tmp_path, keys, expected):
    read = GGUFCheckpoint(write(tmp_path / "r.gguf", llama, keys=keys)).config()
    assert read["rope_parameters"] == {"rope_theta": 5000.0} | expected


def llama3_divisors(theta, head_dim, factor, low, high, original):
    """Divisors of the frequencies as the llama.cpp converter computes them."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("theta", "head_dim", "factor", "high", "original"),
    [(500000.0, 128, 8.0, 4.0, 8192), (500000.0, 64, 32.0, 4.0, 8192), (5000.0, 64, 4.0, 4.0, 64)],
)
def test_llama3_scaling_is_recovered(theta, head_dim, factor, high, original):
    divisors = llama3_divisors(theta, head_dim, factor, 1.0, high, original)
    assert llama3_scaling(divisors, theta, head_dim) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def test_rope_divisors_in_the_file(llama, tmp_path):
    divisors = llama3_divisors(5000.0, HEAD_DIM, 4.0, 1.0, 4.0, 64)
    path = write(tmp_path / "l3.gguf", llama, extra={"rope_freqs.weight": divisors})
    read = GGUFCheckpoint(path)
    assert read.config()["rope_parameters"]["rope_type"] == "llama3"
    assert "rope_freqs.weight" not in list(read)
    odd = np.linspace(1, 7, HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        GGUFCheckpoint(write(tmp_path / "o.gguf", llama, extra={"rope_freqs.weight": odd}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count 8"),
        ({"rope.dimension_count": 32}, "rope.dimension_count 32"),
        ({"attention.value_length": 32}, "attention.value_length 32"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ],
)
def test_what_is_not_implemented_is_refused(llama, tmp_path, keys, message):
    path = write(tmp_path / "x.gguf", llama, keys=keys)
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        GGUFCheckpoint(path)


def test_unknown_architecture_quantization_and_tensor(llama, tmp_path):
    path = tmp_path / "g.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="gemma3"):
        GGUFCheckpoint(path)
    path = write(tmp_path / "i.gguf", llama, kind="Q5_1")
    with pytest.raises(UnsupportedModelError, match="Q5_1"):
        GGUFCheckpoint(path)
    path = write(tmp_path / "e.gguf", llama, extra={"blk.0.ssm_a": np.ones(4, np.float32)})
    with pytest.raises(UnsupportedModelError, match="ssm_a"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("value", ["many", 0, 1.5])
def test_a_key_of_another_kind_is_named(llama, tmp_path, value):
    path = write(tmp_path / "k.gguf", llama, keys={"attention.value_length": value})
    with pytest.raises((CheckpointError, UnsupportedModelError), match=f"value_length.*{value}"):
        GGUFCheckpoint(path)
    path = write(tmp_path / "k.gguf", llama, keys={"block_count": value})
    with pytest.raises(CheckpointError, match=f"block_count is .*{value}"):
        GGUFCheckpoint(path)


def test_truncated_anywhere(llama_gguf, tmp_path):
    data = llama_gguf.read_bytes()
    assert len(data) > 10_000
    lengths = [0, 3, 4, 7, 20, 23, *range(24, 3000, 61), len(data) // 2, len(data) - 1]
    for length in lengths:
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFCheckpoint(path)


def test_lengths_that_lie(llama_gguf, tmp_path):
    data = bytearray(llama_gguf.read_bytes())
    path = tmp_path / "lie.gguf"
    random = np.random.RandomState(0)
    for _ in range(300):  # flipped header bytes: any typed error is fine, or an equal meaning
        broken = bytearray(data[:4000])
        for at in random.randint(0, 2500, 3):
            broken[at] = random.randint(0, 256)
        path.write_bytes(broken + data[4000:])
        with contextlib.suppress(CheckpointError, UnsupportedModelError):
            GGUFCheckpoint(path).config()
    huge = data[:16] + (2**63).to_bytes(8, "little") + data[24:]
    path.write_bytes(huge)
    with pytest.raises(CheckpointError):
        GGUFCheckpoint(path)


def test_one_of_several_parts(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="one of 3 parts"):
        GGUFCheckpoint(tmp_path / "a-00001-of-00003.gguf")


def test_a_missing_tensor_is_named(llama_gguf):
    with pytest.raises(CheckpointError, match=r"no tensor 'nope'"):
        GGUFCheckpoint(llama_gguf).read("nope")
