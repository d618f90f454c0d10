"""Directories of safetensors files: single, sharded, of each dtype, and broken."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from arctic_jax.errors import CheckpointError, UnsupportedModelError
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint

MATRIX = np.arange(60, dtype=np.float32).reshape(6, 10)
VECTOR = np.arange(6, dtype=np.float32) / 4


def write_sharded(directory: Path) -> None:
    save_file({"matrix": MATRIX}, directory / "model-00001-of-00002.safetensors")
    save_file({"vector": VECTOR}, directory / "model-00002-of-00002.safetensors")
    where = {
        "matrix": "model-00001-of-00002.safetensors",
        "vector": "model-00002-of-00002.safetensors",
    }
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_ranges(tmp_path, sharded):
    if sharded:
        write_sharded(tmp_path)
    else:
        save_file({"matrix": MATRIX, "vector": VECTOR}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert sorted(checkpoint) == ["matrix", "vector"]
    assert "matrix" in checkpoint
    assert "other" not in checkpoint
    assert checkpoint.shape("matrix") == (6, 10)
    np.testing.assert_array_equal(checkpoint.read("matrix"), MATRIX)
    np.testing.assert_array_equal(checkpoint.read("matrix", slice(2, 4)), MATRIX[2:4])
    np.testing.assert_array_equal(checkpoint.read("vector", slice(1, 3)), VECTOR[1:3])
    part = checkpoint.read("matrix", columns=slice(3, 7))
    np.testing.assert_array_equal(part, MATRIX[:, 3:7])
    assert checkpoint.read("matrix", slice(6, 6)).shape == (0, 10)
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        checkpoint.read("other")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_are_kept(tmp_path, dtype):
    save_file({"matrix": MATRIX.astype(dtype)}, tmp_path / "model.safetensors")
    read = SafetensorsCheckpoint(tmp_path).read("matrix", slice(1, 3))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, MATRIX[1:3].astype(dtype))


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int8, "I8"), (np.float64, "F64"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")]
)
def test_other_dtypes_are_refused(tmp_path, dtype, name):
    save_file({"w": VECTOR, "odd": MATRIX.astype(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"'odd' has dtype {name}"):
        SafetensorsCheckpoint(tmp_path)


def test_integer_buffers_are_no_weights(tmp_path):
    save_file({"w": VECTOR, "position_ids": np.arange(4)}, tmp_path / "model.safetensors")
    assert SafetensorsCheckpoint(tmp_path).shape("w") == (6,)


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_a_truncated_file_is_named(tmp_path, length):
    path = tmp_path / "model.safetensors"
    save_file({"matrix": MATRIX}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        SafetensorsCheckpoint(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "not json",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
    ],
)
def test_a_bad_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        SafetensorsCheckpoint(tmp_path)


def test_an_index_that_promises_too_much(tmp_path):
    write_sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["third"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks 'third'"):
        SafetensorsCheckpoint(tmp_path)
