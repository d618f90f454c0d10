"""Orbax checkpoints of parameters: what is read, by whom, and what is refused."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax.errors import CheckpointError
from arctic_jax.loading import orbax_checkpoint
from arctic_jax.loading.orbax_checkpoint import MANIFEST, Manifest, OrbaxCheckpoint
from arctic_jax.progress import passing
from arctic_jax.shift_parallel import make_mesh
from arctic_jax.weights import ParameterSpec

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
ROWS = PartitionSpec(("tp", "sp"))
ARRAYS = {
    "embed.weight": np.random.RandomState(0).standard_normal((1024, 256)).astype(np.float32),
    "layers.0.norm.weight": np.arange(256, dtype=np.float32),
    "layers.10.mlp.down": np.random.RandomState(1).standard_normal((64, 256)).astype(np.float32),
}


def specs(dtype: np.dtype = FLOAT32, rows: PartitionSpec = ROWS) -> dict[str, ParameterSpec]:
    """Matrices split by their rows, vectors on every device."""
    return {
        path: ParameterSpec(array.shape, dtype, rows if array.ndim == 2 else PartitionSpec())
        for path, array in ARRAYS.items()
    }


def write(directory: Path, num_devices: int = 4, num_kv_copies: int = 1) -> Path:
    mesh = Mesh(np.array(jax.devices()[:num_devices]).reshape(1, -1), ("tp", "sp"))
    placed = [
        {path: jax.device_put(ARRAYS[path], NamedSharding(mesh, specs()[path].partition))}
        for path in ARRAYS
    ]
    shapes = {path: array.shape for path, array in ARRAYS.items()}
    manifest = Manifest("llama", "float32", num_devices, num_kv_copies, shapes)
    orbax_checkpoint.write(directory, placed, manifest)
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("orbax"))


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return shutil.copytree(written, tmp_path / "copy")


def bytes_read() -> int:
    """What this process has read from files, of the page cache too."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_parameters_come_back_in_the_dtype_asked_for(written, dtype):
    mesh = make_mesh(2, 2)
    loaded: list[int] = []
    restored = OrbaxCheckpoint(written).restore(specs(dtype), mesh)
    placed = dict(passing(restored, lambda: loaded.append(1)))
    assert len(loaded) == len(ARRAYS)
    assert list(placed) == list(ARRAYS)
    for path, array in placed.items():
        assert array.sharding == NamedSharding(mesh, specs()[path].partition)
        np.testing.assert_array_equal(jax.device_get(array), ARRAYS[path].astype(dtype))


@pytest.mark.parametrize(
    ("tp", "sp", "rows"),
    [(1, 1, ROWS), (1, 4, ROWS), (2, 2, PartitionSpec("tp")), (2, 4, PartitionSpec())],
)
def test_every_byte_is_read_once(written, tp, sp, rows):
    """However many devices have a row, and however few."""
    checkpoint = OrbaxCheckpoint(written)
    dict(checkpoint.restore(specs(), make_mesh(1, 1)))  # what is imported is read too
    before = bytes_read()
    dict(checkpoint.restore(specs(rows=rows), make_mesh(tp, sp)))
    size = sum(array.nbytes for array in ARRAYS.values())
    assert size <= bytes_read() - before < 1.1 * size


def test_a_device_has_its_rows_as_one_piece_on_disk(written):
    embed = {
        "driver": "ocdbt",
        "base": f"file://{written}/parameters/embed",
        "path": "embed.weight/",
    }
    stored = tensorstore.open({"driver": "zarr3", "kvstore": embed}).result()
    assert stored.chunk_layout.write_chunk.shape == (1024 // 4, 256)


def test_whom_it_serves(tmp_path, written):
    checkpoint = OrbaxCheckpoint(written)
    assert [checkpoint.num_shards(n) for n in (1, 2, 4)] == [4, 4, 4]
    for n in (3, 8):
        with pytest.raises(
            CheckpointError, match=f"made for 4 devices, not for {n}.*--devices {n}"
        ):
            checkpoint.num_shards(n)
    copies = OrbaxCheckpoint(write(tmp_path / "copies", num_kv_copies=2))
    assert copies.num_shards(4) == 4
    with pytest.raises(CheckpointError, match="4 devices, with 2 copies of each key/value head"):
        copies.num_shards(2)


def test_what_does_not_fit_the_config(written):
    checkpoint, mesh = OrbaxCheckpoint(written), make_mesh(1, 1)
    other = ParameterSpec((4,), FLOAT32, PartitionSpec())
    with pytest.raises(CheckpointError, match=r"lacks 1 parameter\(s\): lm_head.weight"):
        checkpoint.restore(specs() | {"lm_head.weight": other}, mesh)
    with pytest.raises(CheckpointError, match=r"embed.weight has shape \(1024, 256\).* \(4,\)"):
        checkpoint.restore(specs() | {"embed.weight": other}, mesh)


@pytest.mark.parametrize("part", ["embed", "layers.10"])
def test_incomplete_files_are_named(copy, part):
    folder = copy / "parameters" / part
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    size = largest.stat().st_size
    largest.write_bytes(largest.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"{largest.name} has {size - 1000} bytes.* {size}"):
        OrbaxCheckpoint(copy)
    largest.unlink()
    with pytest.raises(CheckpointError, match=f"{largest.name} is missing"):
        OrbaxCheckpoint(copy)


def test_a_part_that_orbax_cannot_read_is_named(copy):
    for file in (copy / "parameters" / "embed").rglob("manifest.ocdbt"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="parameters/embed cannot be read"):
        dict(OrbaxCheckpoint(copy).restore(specs(), make_mesh(1, 2)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[1]", "damaged"),
        ('{"version": 1}', "damaged.*shapes"),
        ('{"version": 1, "shapes": 3}', "damaged"),
        ('{"version": 1, "shapes": {}, "files": {}}', "damaged.*missing"),
        ('{"version": 2}', "version 2, this program reads 1"),
    ],
)
def test_a_bad_manifest_is_named(copy, text, message):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}.*{message}"):
        OrbaxCheckpoint(copy)
