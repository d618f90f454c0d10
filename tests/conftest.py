"""Eight CPU devices for every test; nothing of one test leaks into another."""

import gc
import os
from collections.abc import Iterator

import jax
import pytest

from arctic_jax.engine import memory_maps

# Most of the tests' time would be LLVM's, on programs that run once. For their processes, too.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)

MANY = 10_000  # of the 65,530 memory maps of a process


@pytest.fixture(autouse=True, scope="module")
def give_memory_maps_back() -> Iterator[None]:
    """Drop the programs of earlier tests before there are too many: see `memory_maps`."""
    yield
    if memory_maps.in_use() > MANY:
        jax.clear_caches()
        gc.collect()
