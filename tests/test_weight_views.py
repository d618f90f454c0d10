"""Parts of weights: the same numbers, at addresses within the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from arctic_jax.shift_parallel import make_mesh, shift, ulysses
from arctic_jax.weight_views import rows

MESHES = [(1, 2), (2, 2), (1, 8), (4, 2), (2, 4)]


def addresses(array: jax.Array) -> dict[object, int]:
    return {s.device: s.data.unsafe_buffer_pointer() for s in array.addressable_shards}


def halved(
    tp: int, sp: int, shape: tuple[int, ...], dtype: str
) -> tuple[jax.Array, jax.Array, int]:
    """An array split over tp, what `rows` makes of it split over both, and the bytes copied."""
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    mesh = make_mesh(tp, sp)
    values = np.random.default_rng(0).standard_normal(shape)
    coarse = NamedSharding(mesh, ulysses(tp, sp).partition("heads"))
    fine = NamedSharding(mesh, shift(tp, sp).partition("heads"))
    array = jax.device_put(jnp.asarray(values, dtype), coarse)
    count = shape[0] // (tp * sp)
    begins = {device: s * count for (_, s), device in np.ndenumerate(mesh.devices)}
    view, copied = rows(array, shape, fine, begins)
    assert view.sharding == fine
    return array, view, copied


@pytest.mark.parametrize(("tp", "sp"), MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_view_shares_the_memory(tp: int, sp: int, dtype: str) -> None:
    array, view, copied = halved(tp, sp, (16, 4, 128), dtype)
    assert copied == 0
    np.testing.assert_array_equal(view, array)
    count = 16 // tp // sp
    for index, device in np.ndenumerate(make_mesh(tp, sp).devices):
        offset = addresses(view)[device] - addresses(array)[device]
        assert offset == index[1] * count * 4 * 128 * array.dtype.itemsize


def test_programs_take_views_as_they_take_arrays() -> None:
    array, view, _ = halved(2, 2, (16, 256), "float32")
    double = jax.jit(lambda w: 2 * w, out_shardings=view.sharding)
    np.testing.assert_array_equal(double(view), 2 * np.asarray(array))


def test_unaligned_parts_are_copied_and_counted() -> None:
    array, view, copied = halved(1, 2, (6, 3), "float32")
    np.testing.assert_array_equal(view, array)
    assert copied == 3 * 3 * 4  # the second device's; the first one's begins where the array does
