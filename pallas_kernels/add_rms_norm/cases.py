"""Residual addition and RMSNorm: the named shapes that tests and benchmarks run, and the formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

# Largest difference in one element, relative to 1 + |expected|: the roundings of the sum, of the
# normalised sum and of its product with the weight.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.2e-2}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """`tokens` rows of the residual stream of a model."""

    tokens: int
    hidden: int


CASES = (
    Case("llama_8b_b1", 1, 4096),
    Case("smollm2_135m", 3, 576, race_detection=True),
    Case("qwen2_05b", 2, 896),
    Case("qwen3_06b", 5, 1024, race_detection=True),
    Case("llama_70b", 2, 8192),
    Case("smollm2_fp16", 2, 576, dtype="float16"),
    Case("qwen3_fp32", 2, 1024, dtype="float32"),
    Case("hidden_100", 2, 100),
    Case("hidden_32k", 1, 32768),
    Case("llama_8b_8k", 8192, 4096, tags="bench"),
    Case("smollm2_135m_8k", 8192, 576, tags="bench"),
    Case("llama_70b_8k", 8192, 8192, tags="bench"),
    Case("llama_8b_b256", 256, 4096, tags="bench"),
    Case("llama_8b_b64", 64, 4096, tags="bench"),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.add_rms_norm`; all of them are read, so nothing is poisoned."""
    del poison
    keys = jax.random.split(jax.random.key(seed), 3)
    dtype, shape = jnp.dtype(case.dtype), (case.tokens, case.hidden)
    x = 2 * jax.random.normal(keys[0], shape, dtype)
    delta = jax.random.normal(keys[1], shape, dtype)
    weight = jax.random.uniform(keys[2], shape[1:], dtype, 0.5, 1.5)
    return (x, delta, weight), {"epsilon": 1e-5}


def expected(case: Case, arguments: tuple, keywords: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and its norm in float64."""
    del case
    x, delta, weight = (np.asarray(a).astype(np.float64) for a in arguments)
    x = x + delta
    root_mean_square = np.sqrt((x * x).mean(axis=1, keepdims=True) + keywords["epsilon"])
    return x, x / root_mean_square * weight


comparable = cases.finite


def following(arguments: tuple, output: tuple) -> tuple:
    """Return `arguments` with the norm as the residual stream, so that it does not grow."""
    return (output[1], *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (two arrays in, two out) and 0 operations."""
    elements = 4 * case.tokens * case.hidden + case.hidden
    return elements * jnp.dtype(case.dtype).itemsize, 0.0
