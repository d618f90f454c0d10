"""The recipes by which parameters are cut out of checkpoint tensors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file

from arctic_jax.errors import CheckpointError
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.weights import QKV, Columns, Experts, GateUp, ParameterSpec, Rows, load

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 8, 2, 4, 12, 16
RANDOM = np.random.RandomState(0)
TENSORS = {
    name: RANDOM.standard_normal(shape).astype(np.float32)
    for name, shape in {
        "q": (HEADS * HEAD_DIM, HIDDEN),
        "k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "gate": (FFN, HIDDEN),
        "up": (FFN, HIDDEN),
        "down": (HIDDEN, FFN),
        "norm": (HIDDEN,),
        **{f"expert.{e}.{p}": (FFN, HIDDEN) for e in range(4) for p in ("gate", "up")},
    }.items()
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsCheckpoint:
    directory: Path = tmp_path_factory.mktemp("weights")
    save_file(TENSORS, directory / "model.safetensors")
    return SafetensorsCheckpoint(directory)


def test_rows_past_the_end_are_zero(checkpoint):
    read = Rows("gate").read(checkpoint, 12, 20)
    np.testing.assert_array_equal(read, np.pad(TENSORS["gate"][12:], [(0, 4), (0, 0)]))
    assert not Rows("gate").read(checkpoint, 20, 24).any()
    assert Rows("gate").read(checkpoint, 20, 24).shape == (4, HIDDEN)
    np.testing.assert_array_equal(Rows("norm").read(checkpoint, 2, 5), TENSORS["norm"][2:5])


def test_columns_are_transposed(checkpoint):
    read = Columns("down").read(checkpoint, 3, 9)
    np.testing.assert_array_equal(read, TENSORS["down"].T[3:9])


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_qkv_groups(checkpoint, groups):
    source = QKV("q", "k", "v", HEADS, KV_HEADS, groups, HEAD_DIM)
    read = source.read(checkpoint, 0, groups)
    per_group = HEADS // groups
    assert read.shape == (groups, (per_group + 2) * HEAD_DIM, HIDDEN)
    heads = {n: t.reshape(-1, HEAD_DIM, HIDDEN) for n, t in TENSORS.items() if n in "qkv"}
    for group in range(groups):
        rows = read[group].reshape(-1, HEAD_DIM, HIDDEN)
        first = group * per_group
        kv = first * KV_HEADS // HEADS  # the key head that these query heads share
        np.testing.assert_array_equal(rows[:-2], heads["q"][first : first + per_group])
        np.testing.assert_array_equal(rows[-2], heads["k"][kv])
        np.testing.assert_array_equal(rows[-1], heads["v"][kv])
    np.testing.assert_array_equal(source.read(checkpoint, 1, groups), read[1:])


def test_gate_and_up(checkpoint):
    read = GateUp("gate", "up", shards=4).read(checkpoint, 1, 3)
    assert read.shape == (2, 2, 4, HIDDEN)
    np.testing.assert_array_equal(read[:, 0].reshape(8, HIDDEN), TENSORS["gate"][4:12])
    np.testing.assert_array_equal(read[:, 1].reshape(8, HIDDEN), TENSORS["up"][4:12])


def test_experts_are_read_one_by_one(checkpoint, monkeypatch):
    source = Experts(("expert.{}.gate", "expert.{}.up"), num_experts=4)
    assert source.names == tuple(f"expert.{e}.{p}" for e in range(4) for p in ("gate", "up"))
    read, names = checkpoint.read, []
    monkeypatch.setattr(checkpoint, "read", lambda name: names.append(name) or read(name))
    rows = source.read(checkpoint, 1, 3)
    assert names == list(source.names[2:6])  # those of other devices stay on disk
    for row, expert in zip(rows, (1, 2), strict=True):
        np.testing.assert_array_equal(row[:FFN], TENSORS[f"expert.{expert}.gate"])
        np.testing.assert_array_equal(row[FFN:], TENSORS[f"expert.{expert}.up"])


def test_load_places_and_casts(checkpoint):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("tp", "sp"))
    spec = ParameterSpec((FFN, HIDDEN), jnp.dtype(jnp.bfloat16), PartitionSpec(("tp", "sp")))
    loaded: list[int] = []
    placed = load({"w": spec}, {"w": Rows("up")}, checkpoint, mesh, lambda: loaded.append(1))
    assert loaded == [1]
    np.testing.assert_array_equal(
        jax.device_get(placed["w"]), TENSORS["up"].astype(jnp.dtype(jnp.bfloat16))
    )


def test_load_names_what_is_wrong(checkpoint):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("tp", "sp"))
    spec = ParameterSpec((FFN, HIDDEN + 1), jnp.dtype(jnp.float32), PartitionSpec())
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor\(s\): other"):
        load({"w": spec}, {"w": Rows("other")}, checkpoint, mesh)
    with pytest.raises(CheckpointError, match=r"up gives rows of shape \(12,\).* \(13,\)"):
        load({"w": spec}, {"w": Rows("up")}, checkpoint, mesh)
