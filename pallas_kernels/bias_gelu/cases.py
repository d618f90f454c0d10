"""A bias and GELU: the named shapes that tests and benchmarks run, and the formula.

The same names as in `paged_attention/cases.py`, read by the same test and the same benchmark.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference in one element, relative to 1 + |expected|. XLA rounds the sum, too.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """`tokens` rows between the two products of an encoder's block."""

    name: str
    tags: frozenset[str]
    tokens: int
    size: int
    dtype: str = "bfloat16"
    race_detection: bool = False


def _case(name: str, tokens: int, size: int, tags: str = "ci", **more) -> Case:
    return Case(name, frozenset(tags.split()), tokens, size, **more)


CASES = (
    _case("arctic_m", 8, 3072, race_detection=True),
    _case("minilm", 4, 1536, dtype="float16"),
    _case("float32", 4, 1536, dtype="float32"),
    _case("tokens_3", 3, 1024),
    _case("size_100", 4, 100),
    _case("arctic_m_32k", 32768, 3072, "bench"),
    _case("minilm_32k", 32768, 1536, "bench"),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.bias_gelu`; all of them are read, so nothing is poisoned."""
    del poison
    keys = jax.random.split(jax.random.key(seed))
    dtype = jnp.dtype(case.dtype)
    x = 3 * jax.random.normal(keys[0], (case.tokens, case.size), dtype)
    return (x, jax.random.normal(keys[1], (case.size,), dtype)), {}


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return GELU of the sum in float64."""
    del case, keywords
    x, bias = (np.asarray(a).astype(np.float64) for a in arguments)
    total = x + bias
    return total * (1 + np.vectorize(math.erf)(total / math.sqrt(2))) / 2


def comparable(case: Case, output: jax.Array, arguments: tuple) -> tuple[np.ndarray]:
    """Return the output as float64; all of it must be finite."""
    del arguments
    array = np.asarray(output).astype(np.float64)
    if not np.isfinite(array).all():
        raise AssertionError(f"{case.name}: not finite")
    return (array,)


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with the output as the product."""
    return (output, *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (an array in, one out) and 0 operations."""
    elements = 2 * case.tokens * case.size + case.size
    return elements * jnp.dtype(case.dtype).itemsize, 0.0
