"""The recipes by which parameters are cut out of checkpoint tensors."""

import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file

from arctic_jax.errors import CheckpointError
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.progress import passing
from arctic_jax.shift_parallel import make_mesh
from arctic_jax.weights import QKV, READERS, Columns, Experts, GateUp, ParameterSpec, Rows, load

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
    reads = load({"w": spec}, {"w": Rows("up")}, checkpoint, mesh)
    placed = dict(passing(reads, lambda: loaded.append(1)))
    assert loaded == [1]
    np.testing.assert_array_equal(
        jax.device_get(placed["w"]), TENSORS["up"].astype(jnp.dtype(jnp.bfloat16))
    )


class CountingCheckpoint:
    """Counts the numbers that are read of each tensor, and lists the sizes of the reads."""

    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.counts: Counter[str] = Counter()
        self.sizes: dict[str, set[int]] = defaultdict(set)
        self.threads: set[int] = set()

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(name)

    def read(self, name: str, *ranges: slice, **named: slice) -> np.ndarray:
        part = self.checkpoint.read(name, *ranges, **named)
        self.counts[name] += part.size
        self.sizes[name].add(part.size)
        self.threads.add(threading.get_ident())
        return part


@pytest.mark.parametrize(
    ("tp", "sp", "partition", "parts"),
    [
        (1, 1, PartitionSpec(), 1),
        (2, 2, PartitionSpec("tp"), 2),
        (1, 4, PartitionSpec(("tp", "sp")), 4),
    ],
)
def test_every_number_is_read_once_and_by_the_part(checkpoint, tp, sp, partition, parts):
    """Also where devices hold the same; four groups have two copies of each key/value head."""
    mesh, counting = make_mesh(tp, sp), CountingCheckpoint(checkpoint)
    groups = max(KV_HEADS, parts)
    sources = {
        "qkv": QKV("q", "k", "v", HEADS, KV_HEADS, groups, HEAD_DIM),
        "gate_up": GateUp("gate", "up", 4),
        "down": Columns("down"),
        "norm": Rows("norm"),
        "experts": Experts(("expert.{}.gate", "expert.{}.up"), num_experts=4),
    }
    shapes = {
        "qkv": (groups, (HEADS // groups + 2) * HEAD_DIM, HIDDEN),
        "gate_up": (4, 2, FFN // 4, HIDDEN),
        "down": (FFN, HIDDEN),
        "norm": (HIDDEN,),
        "experts": (4, 2 * FFN, HIDDEN),
    }
    specs = {
        path: ParameterSpec(
            shape, jnp.dtype(jnp.float32), PartitionSpec() if path == "norm" else partition
        )
        for path, shape in shapes.items()
    }
    placed = dict(load(specs, sources, counting, mesh))
    for path, spec in specs.items():
        expected = sources[path].read(checkpoint, 0, spec.shape[0])
        np.testing.assert_array_equal(jax.device_get(placed[path]), expected)
    copies = groups // KV_HEADS
    sizes = {name: tensor.size for name, tensor in TENSORS.items()}
    assert counting.counts == sizes | {"k": copies * sizes["k"], "v": copies * sizes["v"]}
    for name in ("q", "gate", "up", "down"):  # an expert is read whole
        assert max(counting.sizes[name]) <= sizes[name] // parts
    assert threading.get_ident() not in counting.threads
    assert 1 <= len(counting.threads) <= READERS


def test_a_failed_read_ends_the_others(checkpoint):
    class Broken(CountingCheckpoint):
        def read(self, name: str, *ranges: slice, **named: slice) -> np.ndarray:
            if name == "norm":
                raise CheckpointError("norm is broken")
            time.sleep(0.01)
            return super().read(name, *ranges, **named)

    broken = Broken(checkpoint)
    norm = {"norm": ParameterSpec((HIDDEN,), jnp.dtype(jnp.float32), PartitionSpec())}
    spec = ParameterSpec((FFN, HIDDEN), jnp.dtype(jnp.float32), PartitionSpec())
    others = {f"w{i}": spec for i in range(100)}
    sources = {path: Rows("up") for path in others} | {"norm": Rows("norm")}
    with pytest.raises(CheckpointError, match="norm is broken"):
        dict(load(norm | others, sources, broken, make_mesh(1, 1)))
    assert broken.counts["up"] <= 3 * READERS * TENSORS["up"].size


def test_load_names_what_is_wrong(checkpoint):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("tp", "sp"))
    spec = ParameterSpec((FFN, HIDDEN + 1), jnp.dtype(jnp.float32), PartitionSpec())
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor\(s\): other"):
        load({"w": spec}, {"w": Rows("other")}, checkpoint, mesh)
    with pytest.raises(CheckpointError, match=r"up gives rows of shape \(12,\).* \(13,\)"):
        dict(load({"w": spec}, {"w": Rows("up")}, checkpoint, mesh))
