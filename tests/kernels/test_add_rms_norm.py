"""Where the kernel for the sum and RMSNorm is chosen; its results are tested in test_kernels.py."""

import jax
import jax.numpy as jnp
import pytest

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.add_rms_norm import add_rms_norm


# benchmarks/results/h200/suite/kernels_add_rms_norm.json
@pytest.mark.parametrize(
    ("tokens", "size", "kernel"), [(8192, 4096, True), (64, 4096, True), (8192, 576, False)]
)
def test_kernel_is_chosen_where_it_was_not_measured_slower(tokens, size, kernel):
    x = jax.ShapeDtypeStruct((tokens, size), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((size,), jnp.bfloat16)
    with dispatch.lowering_for_hopper():
        # A new function object, since what is traced depends on the machine it is for.
        traced = jax.jit(lambda *a: add_rms_norm(*a, epsilon=1e-5)).trace(x, x, weight)
    assert ("mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()) == kernel
