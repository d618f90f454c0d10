"""Sums over devices: XLA's on forced CPU devices, the kernel lowered, and on several GPUs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.all_reduce import Inboxes, all_reduce, mosaic_gpu
from arctic_jax.pallas_kernels.all_reduce.inboxes import addresses_shape, inbox_bytes

AXES = ("tp", "sp")
SIZES = [(1, 4096), (3, 1024), (8, 576), (64, 4096), (2, 8192), (8, 1152)]


def mesh() -> Mesh:
    count = 4 if jax.device_count() >= 4 else 2
    if jax.device_count() < count:
        pytest.skip("needs two devices")
    return Mesh(np.array(jax.devices()[:count]).reshape(-1, 2), AXES)


def summed(over, x, addresses=None, implementation=None):
    """Each device's sum of the rows `x [P, T, d]`: `[P, T, d]`."""

    def run(x, addresses):
        return all_reduce(x[0], AXES, addresses, implementation=implementation)[None]

    spec = PartitionSpec(AXES)
    lies = spec if addresses is not None else None
    mapped = jax.shard_map(run, mesh=over, in_specs=(spec, lies), out_specs=spec, check_vma=False)
    return jax.jit(mapped)


def parts(over, shape, dtype, seed=0):
    """A part for each device, and their sum in float64."""
    values = jax.random.normal(jax.random.key(seed), (over.size, *shape), dtype)
    return values, np.asarray(values).astype(np.float64).sum(0)


@pytest.mark.parametrize("shape", SIZES)
def test_xla_is_the_sum(shape: tuple[int, int]) -> None:
    over = mesh()
    x, want = parts(over, shape, jnp.float32)
    for total in np.asarray(summed(over, x)(x, None)):
        np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("shape", SIZES)
def test_it_lowers_for_cuda(shape: tuple[int, int], dtype: jnp.dtype) -> None:
    over = mesh()
    x = jax.ShapeDtypeStruct((over.size, *shape), dtype)
    addresses = jax.ShapeDtypeStruct(addresses_shape(over.size), jnp.int32)
    with dispatch.lowering_for_hopper():
        step = summed(over, x, addresses)
        text = step.trace(x, addresses).lower(lowering_platforms=("cuda",)).as_text()
    taken = mosaic_gpu.unsupported(jax.ShapeDtypeStruct(shape, dtype), over.size) is None
    assert ("mosaic_gpu" in text) is taken
    assert ("stablehlo.all_reduce" in text) is not taken


def test_what_the_kernel_takes() -> None:
    def reason(*shape, dtype=jnp.bfloat16):
        return mosaic_gpu.unsupported(jax.ShapeDtypeStruct(shape, dtype), num_devices=4)

    assert reason(1, 4096) is None
    assert reason(8, 576) is None
    assert reason(512, 4096) is None  # 4 MiB, in two rounds
    assert "too many" in str(reason(513, 4096))
    assert "multiple" in str(reason(1, 576))
    assert "int8" in str(reason(1, 4096, dtype=jnp.int8))


def test_large_sums_take_two_rounds() -> None:
    def rounds(*shape):
        return mosaic_gpu.best_rounds(jax.ShapeDtypeStruct(shape, jnp.bfloat16), num_devices=4)

    assert rounds(1, 4096) == 1
    assert rounds(64, 4096) == 2
    assert rounds(251, 576) == 1  # cannot be divided by four


def test_why_not_the_kernel() -> None:
    over = mesh()
    x, _ = parts(over, (1, 4096), jnp.bfloat16)
    with dispatch.lowering_for_hopper(), pytest.raises(ValueError, match="there are no inboxes"):
        summed(over, x, implementation="mosaic_gpu").trace(x, None)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="default backend is 'cpu'"):
            summed(over, x, implementation="mosaic_gpu").trace(x, None)
        assert Inboxes.unavailable(over) == "they are cpus"
        alone = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES)
        assert Inboxes.unavailable(alone) == "there is one device"


def test_addresses_lie_in_the_inboxes() -> None:
    over = mesh()
    inboxes = Inboxes(over)
    table = np.asarray(inboxes.addresses).view(np.uint64)
    own = table[:, -1]
    for sender, targets in enumerate(table[:, :-1]):
        for target, address in enumerate(targets):
            assert own[target] < address < own[target] + inbox_bytes(over.size)
            assert address == table[0, target] + sender * (table[1, 0] - table[0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_kernel_is_the_sum(dtype: jnp.dtype) -> None:
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    over = mesh()
    inboxes = Inboxes(over)
    tolerance = over.size * float(jnp.finfo(dtype).eps)
    spec = PartitionSpec(AXES)

    @functools.partial(jax.jit, static_argnames="rounds")
    def total(x, addresses, rounds):
        def run(x, addresses):
            return mosaic_gpu.all_reduce(x[0], addresses, rounds)[None]

        return jax.shard_map(
            run, mesh=over, in_specs=(spec, spec), out_specs=spec, check_vma=False
        )(x, addresses)

    # Sizes in turns: thread blocks that are in one call and not in another count for themselves.
    calls = [(shape, rounds) for shape in SIZES for rounds in (1, 2)]
    calls = [
        (shape, rounds)
        for shape, rounds in calls
        if math.prod(shape)
        * jnp.dtype(dtype).itemsize
        % (8 * 128 * (over.size if rounds == 2 else 1))
        == 0
    ]
    assert {rounds for _, rounds in calls} == {1, 2}
    for seed in range(10 * len(calls)):
        shape, rounds = calls[seed % len(calls)]
        x, want = parts(over, shape, dtype, seed)
        totals = np.asarray(total(x, inboxes.addresses, rounds))
        assert (totals == totals[0]).all()  # the same bits everywhere
        error = np.abs(totals[0].astype(np.float64) - want) / (1 + np.abs(want))
        assert error.max() <= tolerance
