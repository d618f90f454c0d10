"""Residual addition and RMSNorm: the named shapes that tests and benchmarks run, and the formula.

The same names as in `paged_attention/cases.py`, read by the same test and the same benchmark.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference in one element, relative to 1 + |expected|: the roundings of the sum, of the
# normalised sum and of its product with the weight.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """`tokens` rows of the residual stream of a model."""

    name: str
    tags: frozenset[str]
    tokens: int
    hidden: int
    dtype: str = "bfloat16"
    race_detection: bool = False


def _case(name: str, tokens: int, hidden: int, tags: str = "ci", **more) -> Case:
    return Case(name, frozenset(tags.split()), tokens, hidden, **more)


CASES = (
    _case("llama_8b_b1", 1, 4096),
    _case("smollm2_135m", 3, 576, race_detection=True),
    _case("qwen2_05b", 2, 896),
    _case("qwen3_06b", 5, 1024, race_detection=True),
    _case("llama_70b", 2, 8192),
    _case("smollm2_fp16", 2, 576, dtype="float16"),
    _case("qwen3_fp32", 2, 1024, dtype="float32"),
    _case("hidden_100", 2, 100),
    _case("hidden_32k", 1, 32768),
    _case("llama_8b_8k", 8192, 4096, "bench"),
    _case("smollm2_135m_8k", 8192, 576, "bench"),
    _case("llama_70b_8k", 8192, 8192, "bench"),
    _case("llama_8b_b256", 256, 4096, "bench"),
    _case("llama_8b_b64", 64, 4096, "bench"),
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


def comparable(case: Case, output: tuple, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return both outputs as float64; all of them must be finite."""
    del arguments
    arrays = tuple(np.asarray(array).astype(np.float64) for array in output)
    if not all(np.isfinite(array).all() for array in arrays):
        raise AssertionError(f"{case.name}: not finite")
    return arrays


def following(arguments: tuple, output: tuple) -> tuple:
    """Return `arguments` with the norm as the residual stream, so that it does not grow."""
    return (output[1], *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (two arrays in, two out) and 0 operations."""
    elements = 4 * case.tokens * case.hidden + case.hidden
    return elements * jnp.dtype(case.dtype).itemsize, 0.0
