"""Residual addition and LayerNorm: the named shapes that tests and benchmarks run, and the formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

# Largest difference in one element, relative to 1 + |expected|: the rounding of the result, which
# is a small one where weight and bias take each other away.
TOLERANCE = {"float32": 3e-6, "float16": 1.5e-3, "bfloat16": 8e-3}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """`tokens` rows of the residual stream of an encoder."""

    tokens: int
    hidden: int


CASES = (
    Case("arctic_m", 8, 768, dtype="float16", race_detection=True),
    Case("minilm", 4, 384, dtype="float32"),
    Case("arctic_l", 4, 1024),
    Case("tokens_3", 3, 768),
    Case("hidden_100", 4, 100),
    Case("arctic_m_32k", 32768, 768, tags="bench"),
    Case("minilm_32k", 32768, 384, tags="bench"),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.add_layer_norm`; all of them are read, so nothing is poisoned."""
    del poison
    keys = jax.random.split(jax.random.key(seed), 5)
    dtype, shape = jnp.dtype(case.dtype), (case.tokens, case.hidden)
    x = 2 * jax.random.normal(keys[0], shape, dtype) + 3
    delta = jax.random.normal(keys[1], shape, dtype)
    weight = jax.random.uniform(keys[2], shape[1:], dtype, 0.5, 1.5)
    bias, delta_bias = (jax.random.normal(key, shape[1:], dtype) for key in keys[3:])
    return (x, delta, delta_bias, weight, bias), {"epsilon": 1e-5}


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return the normalised sum in float64."""
    del case
    x, delta, delta_bias, weight, bias = (np.asarray(a).astype(np.float64) for a in arguments)
    x = x + delta + delta_bias
    x = x - x.mean(axis=1, keepdims=True)
    deviation = np.sqrt((x * x).mean(axis=1, keepdims=True) + keywords["epsilon"])
    return x / deviation * weight + bias


comparable = cases.finite


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with the output as the residual stream."""
    return (output, *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (two arrays in, one out) and 0 operations."""
    elements = 3 * case.tokens * case.hidden + 3 * case.hidden
    return elements * jnp.dtype(case.dtype).itemsize, 0.0
