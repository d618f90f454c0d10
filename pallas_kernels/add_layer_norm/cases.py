"""Residual addition and LayerNorm: the named shapes that tests and benchmarks run, and the formula.

The same names as in `paged_attention/cases.py`, read by the same test and the same benchmark.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference in one element, relative to 1 + |expected|: the rounding of the result, which
# is a small one where weight and bias take each other away.
TOLERANCE = {"float32": 3e-6, "float16": 1.5e-3, "bfloat16": 8e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """`tokens` rows of the residual stream of an encoder."""

    name: str
    tags: frozenset[str]
    tokens: int
    hidden: int
    dtype: str = "bfloat16"
    race_detection: bool = False


def _case(name: str, tokens: int, hidden: int, tags: str = "ci", **more) -> Case:
    return Case(name, frozenset(tags.split()), tokens, hidden, **more)


CASES = (
    _case("arctic_m", 8, 768, dtype="float16", race_detection=True),
    _case("minilm", 4, 384, dtype="float32"),
    _case("arctic_l", 4, 1024),
    _case("tokens_3", 3, 768),
    _case("hidden_100", 4, 100),
    _case("arctic_m_32k", 32768, 768, "bench"),
    _case("minilm_32k", 32768, 384, "bench"),
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


def comparable(case: Case, output: jax.Array, arguments: tuple) -> tuple[np.ndarray]:
    """Return the output as float64; all of it must be finite."""
    del arguments
    array = np.asarray(output).astype(np.float64)
    if not np.isfinite(array).all():
        raise AssertionError(f"{case.name}: not finite")
    return (array,)


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with the output as the residual stream."""
    return (output, *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (two arrays in, one out) and 0 operations."""
    elements = 3 * case.tokens * case.hidden + 3 * case.hidden
    return elements * jnp.dtype(case.dtype).itemsize, 0.0
