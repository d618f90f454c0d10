"""Product of few rows with matrices of their own: the named shapes, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases
from arctic_jax.pallas_kernels.ragged_dot.cases import QWEN3_30B

# Largest difference in one element, relative to 1 + |expected|: one rounding of numbers near 1.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """Rows times `[N, K]` matrices of `G` experts; those of rows that are none's are outside."""

    experts: tuple[int, ...]
    G: int
    N: int
    K: int


def _routed(tokens: int, top_k: int, experts: int) -> tuple[int, ...]:
    """Return the experts of tokens that go to `top_k` of them at random."""
    random = np.random.RandomState(0)
    chosen = np.argsort(random.random_sample((tokens, experts)), axis=1)[:, :top_k]
    return tuple(map(int, chosen.reshape(-1)))


CASES = (
    Case("one_row", (1,), 3, 64, 64, race_detection=True),
    Case("in_any_order", (4, 0, 4, 2, 1), 5, 128, 128, race_detection=True),
    Case("some_of_no_expert", (-1, 1, 2, 0, 7), 2, 64, 128),
    Case("none_of_any", (-1, 2), 2, 64, 64),
    Case("as_many_as_there_can_be", (*range(32), *range(32)), 33, 64, 64),
    Case("more_than_the_kernel_takes", (*range(32), *range(33)), 33, 64, 64),
    Case("fp16", (1, 0), 2, 64, 64, dtype="float16"),
    Case("fp32", (1, 0), 2, 64, 64, dtype="float32"),
    Case("odd_sizes", (1, 0), 2, 40, 24),
    *(
        Case(f"qwen3_30b_{part}_{tokens}", _routed(tokens, 8, 128), 128, *shape, tags="bench")
        for part, shape in QWEN3_30B.items()
        for tokens in (1, 2, 4, 8)
    ),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.expert_dot`; rows that belong to no expert are poisoned."""
    keys = jax.random.split(jax.random.key(seed), 2)
    dtype = jnp.dtype(case.dtype)
    rows = jax.random.normal(keys[0], (len(case.experts), case.K), dtype)
    if poison is not None:
        rows = jnp.where(_defined(case)[:, None], rows, poison).astype(dtype)
    weight = jax.random.normal(keys[1], (case.G, case.N, case.K), dtype)
    weight = weight * jnp.asarray(case.K**-0.5, dtype)
    return (rows, weight, jnp.array(case.experts, jnp.int32)), {}


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return the products in float64, NaN (not defined) for rows of no expert."""
    del keywords
    rows, weight = (np.asarray(a).astype(np.float64) for a in arguments[:2])
    out = np.full((len(rows), case.N), np.nan)
    for i in np.flatnonzero(_defined(case)):
        out[i] = weight[case.experts[i]] @ rows[i]
    return out


def comparable(case: Case, output: jax.Array, arguments: tuple) -> tuple[np.ndarray]:
    """Return the output as float64; rows of an expert must be finite."""
    del arguments
    array = np.asarray(output).astype(np.float64)
    if not np.isfinite(array[_defined(case)]).all():
        raise AssertionError(f"{case.name}: not finite")
    return (array,)


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with the product as rows: calls run one after another."""
    return (jnp.resize(output, arguments[0].shape), *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (each expert's matrix once) and the operations."""
    used = int(_defined(case).sum())
    matrices = len(set(np.array(case.experts)[_defined(case)].tolist()))
    elements = used * (case.K + case.N) + matrices * case.N * case.K
    return elements * jnp.dtype(case.dtype).itemsize, 2.0 * used * case.N * case.K


def _defined(case: Case) -> np.ndarray:
    experts = np.array(case.experts)
    return (experts >= 0) & (experts < case.G)
