"""GELU of every 16-bit float, against the error function in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arctic_jax.pallas_kernels.gelu import gelu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = bits.view(jnp.dtype(dtype))
    with np.errstate(invalid="ignore"):  # some are NaN
        x = x[np.abs(x.astype(np.float64)) < 1e4]
    wide = x.astype(np.float64)
    wanted = wide * np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in wide])
    error = np.abs(np.asarray(jax.jit(gelu)(x)).astype(np.float64) - wanted)
    rounding = float(jnp.finfo(dtype).eps) / 2
    assert (error <= 7e-5 + 1.01 * rounding * np.abs(wanted)).all()


def test_float32_is_exact() -> None:
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    wanted = [value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x.astype(np.float64)]
    np.testing.assert_allclose(jax.jit(gelu)(x), wanted, atol=1e-6)
