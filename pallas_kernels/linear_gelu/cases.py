"""GELU of a product: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from arctic_jax.pallas_kernels import cases

# Largest difference in one element, relative to 1 + |expected|: the roundings of the result, and
# for "xla" those of the product and of its sum with the bias, numbers near 1.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """`tokens` rows of `inputs` numbers to rows of `outputs`."""

    tokens: int
    inputs: int
    outputs: int


CASES = (
    Case("one_tile", 128, 64, 64, race_detection=True),
    # A thread block has several tiles for each of its two warpgroups that multiply.
    Case("tiles_in_turn", 1104, 128, 192, race_detection=True),
    Case("odd_tokens", 203, 192, 128, race_detection=True),
    Case("few_tokens", 3, 64, 384),
    Case("fp16", 300, 128, 320, dtype="float16"),
    Case("float32", 40, 64, 64, dtype="float32"),
    Case("odd_sizes", 40, 100, 72),
    # Many tiles for each of a GPU's thread blocks, the last ones past the end of the tokens.
    Case("many_odd_tokens", 5001, 192, 3072, tags="gpu"),
    Case("bert_base_32k", 32768, 768, 3072, tags="bench"),
    Case("bert_base_4k", 4096, 768, 3072, tags="bench"),
    Case("minilm_32k", 32768, 384, 1536, tags="bench"),
    Case("xlm_roberta_large_32k", 32768, 1024, 4096, tags="bench"),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.linear_gelu`; all of them are read, so nothing is poisoned."""
    del poison
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (case.tokens, case.inputs), case.dtype)
    weight = jax.random.normal(keys[1], (case.inputs, case.outputs), case.dtype)
    weight = weight * jnp.asarray(case.inputs**-0.5, case.dtype)
    return (x, weight, jax.random.normal(keys[2], (case.outputs,), case.dtype)), {}


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return GELU of the product in float64."""
    del case, keywords
    x, weight, bias = (np.asarray(a).astype(np.float64) for a in arguments)
    product = x @ weight + bias
    return product * 0.5 * np.vectorize(math.erfc)(-product / math.sqrt(2))


comparable = cases.finite


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with tokens that depend on the result, so that calls run in turn.

    Through one of them: a pass over the arrays would take half as long as the product does.
    """
    x = arguments[0]
    first = x[:1, :1] + 0 * output[:1, :1]
    return (lax.dynamic_update_slice(x, first, (0, 0)), *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved and the floating-point operations that must be done."""
    T, K, N = case.tokens, case.inputs, case.outputs
    moved = (T * K + K * N + N + T * N) * jnp.dtype(case.dtype).itemsize
    return float(moved), 2.0 * T * K * N
