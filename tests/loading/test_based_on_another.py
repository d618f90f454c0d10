"""A directory that holds what it has beyond another model."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arctic_jax import LLM, SamplingParams, testing
from arctic_jax.config import LoadConfig
from arctic_jax.errors import CheckpointError
from arctic_jax.loading import hub
from arctic_jax.loading.model_files import open_model
from arctic_jax.training import swiftkv_checkpoint

BASE = dict(testing.TINY_LLAMA) | {"num_hidden_layers": 4}
STUDENT = {"architectures": ["LlamaSwiftKVForCausalLM"], "num_key_value_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write_model(tmp_path_factory.mktemp("base"), BASE)


def write(directory: Path, base: str, tensors: dict[str, np.ndarray]) -> Path:
    directory.mkdir()
    config = {"base_model_name_or_path": base, **STUDENT}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_it_is_the_whole_model(base: Path, tmp_path: Path) -> None:
    """A student's own tensors over its base are the student."""
    load = LoadConfig(model=str(base))
    rng = np.random.default_rng(0)
    swiftkv_checkpoint.convert(load, tmp_path / "converted", 2)
    whole = {}
    for file in (tmp_path / "converted").glob("*.safetensors"):
        whole |= load_file(file)
    own = {
        name: (tensor + 0.1 * rng.normal(size=tensor.shape)).astype(np.float32)
        for name, tensor in whole.items()
        if "swiftkv" in name
    }
    save_file(own, tmp_path / "own.safetensors")
    swiftkv_checkpoint.convert(load, tmp_path / "whole", 2, 1, tmp_path / "own.safetensors")
    slim = write(tmp_path / "slim", str(base), own)
    greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=1)
    found = []
    for path in (tmp_path / "whole", slim):
        llm = LLM(str(path), num_blocks=16, max_num_seqs=4, max_model_len=128, progress=False)
        found.append(llm.generate(["one prompt"], greedy)[0].outputs[0])
    assert found[0].token_ids == found[1].token_ids
    assert found[0].logprobs == found[1].logprobs


def test_what_it_holds_comes_first(base: Path, tmp_path: Path) -> None:
    norm = np.full(BASE["hidden_size"], 3, np.float32)
    files = open_model(LoadConfig(model=str(write(tmp_path / "m", str(base), {"new": norm}))))
    there = swiftkv_checkpoint.original_weights(open_model(LoadConfig(model=str(base))))
    checkpoint = swiftkv_checkpoint.original_weights(files)
    assert {*checkpoint} == {"new", *there}
    assert "new" in checkpoint
    assert checkpoint.shape("new") == norm.shape
    assert files.config["num_key_value_layers"] == 2
    assert files.config["hidden_size"] == BASE["hidden_size"]
    path = write(tmp_path / "n", str(base), {"model.norm.weight": norm})
    checkpoint = swiftkv_checkpoint.original_weights(open_model(LoadConfig(model=str(path))))
    assert [*checkpoint].count("model.norm.weight") == 1
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), norm)


def test_one_upon_another_upon_another_is_refused(base: Path, tmp_path: Path) -> None:
    some = {"x": np.zeros(1, np.float32)}
    first = write(tmp_path / "first", str(base), some)
    second = write(tmp_path / "second", str(first), some)
    with pytest.raises(CheckpointError, match="based on another model itself"):
        open_model(LoadConfig(model=str(second)))


def test_what_is_shipped_is_of_the_packaged_model() -> None:
    directory = hub.resolve_model(hub.SWIFTKV_MODEL)
    config = json.loads((directory / "config.json").read_text())
    assert config["base_model_name_or_path"] == hub.PACKAGED_MODEL
    own = load_file(directory / "model.safetensors")
    upper = range(config["num_key_value_layers"], 30)
    expected = {"model.norm_swiftkv.weight"} | {
        f"model.layers.{i}.self_attn.{p}_proj_swiftkv.weight" for i in upper for p in "qkv"
    }
    assert own.keys() == expected
