"""Results come to the host whole, from device memory and from pinned memory."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax import host_copies


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_what_arrives_outlives_the_array(kind: str, num_devices: int) -> None:
    mesh = Mesh(np.asarray(jax.devices()[:num_devices]), ("d",))
    there = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
    make = jax.jit(lambda n: jnp.arange(600_000, dtype=jnp.float32).reshape(2, -1) + n)
    make = jax.jit(make, out_shardings=there)
    arrived = []
    for n in range(4):
        array = make(n)
        assert array.sharding.memory_kind == kind
        host_copies.start(array)
        arrived.append(host_copies.finish(array))
        del array
    for n, values in enumerate(arrived):
        np.testing.assert_array_equal(values, np.arange(600_000).reshape(2, -1) + n)


def test_a_process_may_end_in_the_middle_of_a_transfer() -> None:
    code = """
import jax, jax.numpy as jnp
from arctic_jax import host_copies
def work(x):
    for _ in range(20):
        x = jnp.tanh(x @ x)
    return x
work, x = jax.jit(work), jnp.ones((800, 800))
jax.block_until_ready(work(x))
host_copies.start(work(x))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
