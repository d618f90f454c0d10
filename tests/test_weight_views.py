"""Finer shards of weights: the same numbers, at addresses within the coarser ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from arctic_jax.shift_parallel import make_mesh, shift, ulysses
from arctic_jax.weight_views import finer

MESHES = [(1, 2), (2, 2), (1, 8), (4, 2), (2, 4)]


def addresses(array: jax.Array) -> dict[object, int]:
    return {s.device: s.data.unsafe_buffer_pointer() for s in array.addressable_shards}


def placed(tp: int, sp: int, shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, NamedSharding]:
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    mesh = make_mesh(tp, sp)
    values = np.random.default_rng(0).standard_normal(shape)
    coarse = NamedSharding(mesh, ulysses(tp, sp).partition("heads"))
    fine = NamedSharding(mesh, shift(tp, sp).partition("heads"))
    return jax.device_put(jnp.asarray(values, dtype), coarse), fine


@pytest.mark.parametrize(("tp", "sp"), MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_view_shares_the_memory(tp: int, sp: int, dtype: str) -> None:
    array, sharding = placed(tp, sp, (16, 4, 128), dtype)
    view, copied = finer(array, sharding)
    assert copied == 0
    assert view.sharding == sharding
    np.testing.assert_array_equal(view, array)
    rows = 16 // tp // sp
    for index, device in np.ndenumerate(sharding.mesh.devices):
        offset = addresses(view)[device] - addresses(array)[device]
        assert offset == index[1] * rows * 4 * 128 * array.dtype.itemsize


def test_programs_take_views_as_they_take_arrays() -> None:
    array, sharding = placed(2, 2, (16, 256), "float32")
    view, _ = finer(array, sharding)
    double = jax.jit(lambda w: 2 * w, out_shardings=sharding)
    np.testing.assert_array_equal(double(view), 2 * np.asarray(array))


def test_what_is_not_split_further_is_the_same_array() -> None:
    array, sharding = placed(2, 2, (16, 256), "float32")
    replicated = jax.device_put(array, NamedSharding(sharding.mesh, PartitionSpec()))
    assert finer(replicated, NamedSharding(sharding.mesh, PartitionSpec()))[0] is replicated


def test_unaligned_parts_are_copied_and_counted() -> None:
    array, sharding = placed(1, 2, (6, 3), "float32")
    view, copied = finer(array, sharding)
    np.testing.assert_array_equal(view, array)
    assert copied == 3 * 3 * 4  # the second device's; the first one's begins where the array does


def test_rows_that_a_device_does_not_have_are_refused() -> None:
    array, sharding = placed(2, 2, (16, 256), "float32")
    with pytest.raises(ValueError, match=r"has rows 0:8 of \(16, 256\), .* gives it 8:12"):
        finer(array, NamedSharding(sharding.mesh, PartitionSpec(("sp", "tp"))))
