"""`convert`: what it writes is the same model, on every mesh that it is for."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoint import write_checkpoint
from tiny_engine import CONFIG, run

from arctic_jax import EngineConfig, SamplingParams, weights
from arctic_jax.config import LoadConfig
from arctic_jax.engine.conversion import convert, usual_devices
from arctic_jax.engine.core import EngineCore
from arctic_jax.errors import CheckpointError
from arctic_jax.loading.model_files import open_model
from arctic_jax.loading.orbax_checkpoint import OrbaxCheckpoint
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.models.layers import named_parameters
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.models.registry import model_class
from arctic_jax.shift_parallel import make_mesh, ulysses
from arctic_jax.testing import write_model

# With biases, norms of queries and keys, tied embeddings.
CASES = ("llama_gqa", "llama_mha_tied", "llama_mlp_bias", "qwen2_gqa", "qwen3_mqa_tied")
SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "block_size": 4, "num_blocks": 32}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> LoadConfig:
    """Two key/value heads: for four devices they are copied."""
    defaults = {"top_k": 7}
    path = write_checkpoint(tmp_path_factory.mktemp("tiny"), generation_config=defaults)
    return LoadConfig(model=str(path))


def load(directory: Path, config: dict[str, Any], tp: int, sp: int) -> dict[str, jax.Array]:
    """Place the weights of a directory as the engine does."""
    checkpoint = open_model(LoadConfig(model=str(directory))).checkpoint
    assert isinstance(checkpoint, OrbaxCheckpoint | SafetensorsCheckpoint)
    is_converted = isinstance(checkpoint, OrbaxCheckpoint)
    num_shards = checkpoint.num_shards(tp * sp) if is_converted else tp * sp
    cls = model_class(config)
    model = nnx.eval_shape(lambda: cls(cls.config_from_hf(config), num_shards))
    parameters = {
        path: weights.ParameterSpec(
            variable.shape,
            jnp.dtype(jnp.float32),
            ulysses(tp, sp).partition(variable.get_metadata("axis")),
        )
        for path, variable in named_parameters(model).items()
    }
    if is_converted:
        return dict(checkpoint.restore(parameters, make_mesh(tp, sp)))
    return dict(weights.load(parameters, model.weight_sources(), checkpoint, make_mesh(tp, sp)))


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_every_kind_of_model(name, tmp_path):
    config = cases.CASES[name] | {"vocab_size": 300}
    write_model(tmp_path / "original", config, cases.SEED)
    convert(LoadConfig(model=str(tmp_path / "original")), tmp_path / "converted", 2)
    for tp, sp in ((2, 1), (1, 2)):
        loaded = load(tmp_path / "original", config, tp, sp)
        converted = load(tmp_path / "converted", config, tp, sp)
        assert converted.keys() == loaded.keys()
        for path, array in loaded.items():
            assert converted[path].sharding == array.sharding
            np.testing.assert_array_equal(jax.device_get(converted[path]), jax.device_get(array))


@pytest.mark.parametrize(("tp", "sp", "num_devices"), [(1, 1, None), (2, 2, 4), (1, 4, 4)])
def test_the_same_logits_bit_for_bit(original, tmp_path, tp, sp, num_devices, caplog):
    """On one device too, where the weights are laid out for two."""
    convert(original, tmp_path / "converted", num_devices)
    config = EngineConfig.from_keywords(
        tensor_parallel_size=tp,
        ulysses_sequence_parallel_size=sp,
        shift_parallel_threshold=4,
        **SMALL,
    )
    answers = []
    caplog.set_level("INFO", "arctic_jax.engine")
    for model in (original, LoadConfig(model=str(tmp_path / "converted"))):
        engine = EngineCore(config, files=open_model(model))
        params = SamplingParams(temperature=0, max_tokens=6, logprobs=20, ignore_eos=True)
        engine.add_request("0", [5, 6, 7, 8, 9], params)
        (answer,) = run(engine)["0"].outputs
        answers.append((answer.token_ids, answer.logprobs))
    assert answers[0] == answers[1]
    said = [message for message in caplog.messages if message.startswith("loaded")]
    assert len(said) == 2
    assert all(re.fullmatch(r"loaded 0.00 GB of weights in .* s \(.* GB/s\)", m) for m in said)


def test_the_files_beside_the_weights(original, tmp_path):
    convert(original, tmp_path / "converted")
    before = open_model(original)
    after = open_model(LoadConfig(model=str(tmp_path / "converted")))
    assert after.config == {**before.config, "dtype": "float32"}
    assert after.generation_config == before.generation_config == {"top_k": 7}
    assert before.directory is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "converted" / name).read_bytes() == (
            before.directory / name
        ).read_bytes()
    assert not list((tmp_path / "converted").glob("*.safetensors"))


def test_another_dtype(original, tmp_path):
    bfloat16 = LoadConfig(model=original.model, dtype="bfloat16")
    convert(bfloat16, tmp_path / "converted")
    assert open_model(LoadConfig(model=str(tmp_path / "converted"))).config["dtype"] == "bfloat16"
    loaded = load(Path(original.model), CONFIG, 1, 2)
    for path, array in load(tmp_path / "converted", CONFIG, 1, 2).items():
        rounded = loaded[path].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(jax.device_get(array), jax.device_get(rounded))


def test_other_numbers_of_devices_are_refused(original, tmp_path):
    convert(original, tmp_path / "two", 2)
    convert(original, tmp_path / "four", 4)
    load(tmp_path / "two", CONFIG, 1, 1)
    with pytest.raises(CheckpointError, match=r"made for 2 devices, not for 4; .*--devices 4"):
        load(tmp_path / "two", CONFIG, 2, 2)
    with pytest.raises(CheckpointError, match=r"4 devices, with 2 copies .* not for 2; "):
        load(tmp_path / "four", CONFIG, 1, 2)
    with pytest.raises(ValueError, match="cannot be split over 3 devices"):
        convert(original, tmp_path / "three", 3)
    assert sorted(os.listdir(tmp_path)) == ["four", "two"]


def test_a_config_of_another_model_is_refused(original, tmp_path):
    convert(original, tmp_path / "converted")
    config = CONFIG | {"intermediate_size": 128}
    with pytest.raises(CheckpointError, match=r"mlp.down has shape \(64, 32\), .* \(128, 32\)"):
        load(tmp_path / "converted", config, 1, 1)


def test_the_usual_number_of_devices_needs_no_copies():
    def usual(**changes: int) -> int:
        return usual_devices(LlamaForCausalLM.config_from_hf(CONFIG | changes))

    assert usual() == 2
    assert usual(num_key_value_heads=8) == 8
    assert usual(num_key_value_heads=8, intermediate_size=12) == 4
    assert usual(num_key_value_heads=1) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_interrupted_leaves_nothing(original, tmp_path, monkeypatch, error):
    real: Callable[..., Any] = weights.load
    calls: list[list[str]] = []

    def interrupted(*arguments: Any) -> Any:
        (room,) = tmp_path.iterdir()
        (half,) = room.iterdir()
        with pytest.raises(CheckpointError):  # what a killed process would leave behind
            open_model(LoadConfig(model=str(half)))
        calls.append(list(arguments[0]))
        if len(calls) == 3:
            raise error("stopped")
        return real(*arguments)

    monkeypatch.setattr(weights, "load", interrupted)
    with pytest.raises(error, match="stopped"):
        convert(original, tmp_path / "converted")
    assert not list(tmp_path.iterdir())
    assert len(calls) == 3
    assert all(len({path.split(".")[1] for path in paths}) == 1 for paths in calls)  # one layer


def test_nothing_is_overwritten_and_nothing_converted_twice(original, tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError, match="there already exists"):
        convert(original, tmp_path / "there")
    convert(original, tmp_path / "converted")
    with pytest.raises(CheckpointError, match="original"):
        convert(LoadConfig(model=str(tmp_path / "converted")), tmp_path / "again")


def test_progress_counts_parameters(original, tmp_path):
    reports: list[tuple[str, int, int]] = []
    convert(original, tmp_path / "converted", report=lambda *report: reports.append(report))
    shapes = json.loads((tmp_path / "converted" / "arctic_jax.json").read_text())["shapes"]
    total = len(shapes)
    assert reports == [("Converting weights", n, total) for n in range(1, total + 1)]
