"""Grouped product: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

# Largest difference in one element, relative to 1 + |expected|: one rounding of numbers near 1.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """Groups of rows times `[N, K]` matrices."""

    group_sizes: tuple[int, ...]
    N: int
    K: int
    _: dataclasses.KW_ONLY
    rows_of_none: int = 0  # past the last group


def _routed(tokens: int, top_k: int, experts: int) -> tuple[int, ...]:
    """Return the rows of each expert when tokens go to `top_k` of them at random."""
    random = np.random.RandomState(0)
    chosen = np.argsort(random.random_sample((tokens, experts)), axis=1)[:, :top_k]
    return tuple(int(n) for n in np.bincount(chosen.reshape(-1), minlength=experts))


QWEN3_30B = {"gate_up": (1536, 2048), "down": (2048, 768)}

CASES = (
    Case("one_row", (0, 1, 0), 64, 64, race_detection=True),
    Case("groups_within_a_tile", (3, 0, 5, 1), 128, 128),
    Case("groups_across_tiles", (70, 0, 1, 63, 10), 64, 128, race_detection=True),
    Case("whole_tiles", (64, 128, 0), 64, 64),
    Case("rows_of_no_group", (5, 0, 66), 64, 128, rows_of_none=60),
    Case("no_row_of_any_group", (0, 0), 64, 64, rows_of_none=9),
    Case("all_in_the_last_group", (0, 0, 0, 77), 64, 64),
    Case("large_tiles", (200, 56), 128, 192),
    Case("fp16", (9, 2), 64, 64, dtype="float16"),
    Case("fp32", (9, 0, 2), 64, 64, dtype="float32"),
    Case("odd_sizes", (2, 3), 40, 24),
    *(
        Case(f"qwen3_30b_{part}_{tokens}", _routed(tokens, 8, 128), *shape, tags="bench")
        for part, shape in QWEN3_30B.items()
        for tokens in (1, 16, 256, 8192)
    ),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.ragged_dot`; rows that belong to no group are poisoned."""
    keys = jax.random.split(jax.random.key(seed), 2)
    dtype, used = jnp.dtype(case.dtype), sum(case.group_sizes)
    rows = jax.random.normal(keys[0], (used + case.rows_of_none, case.K), dtype)
    if poison is not None:
        rows = rows.at[used:].set(poison)
    weight = jax.random.normal(keys[1], (len(case.group_sizes), case.N, case.K), dtype)
    weight = weight * jnp.asarray(case.K**-0.5, dtype)
    return (rows, weight, jnp.array(case.group_sizes, jnp.int32)), {}


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return the products in float64, NaN (not defined) for rows of no group."""
    del keywords
    rows, weight = (np.asarray(a).astype(np.float64) for a in arguments[:2])
    out = np.full((len(rows), case.N), np.nan)
    end = 0
    for size, matrix in zip(case.group_sizes, weight, strict=True):
        begin, end = end, end + size
        out[begin:end] = rows[begin:end] @ matrix.T
    return out


def comparable(case: Case, output: jax.Array, arguments: tuple) -> tuple[np.ndarray]:
    """Return the output as float64; rows of a group must be finite."""
    del arguments
    array = np.asarray(output).astype(np.float64)
    if not np.isfinite(array[: sum(case.group_sizes)]).all():
        raise AssertionError(f"{case.name}: not finite")
    return (array,)


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with the product as rows: calls run one after another."""
    return (jnp.resize(output, arguments[0].shape), *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (matrices of empty groups not) and the operations."""
    used = sum(case.group_sizes)
    matrices = sum(size > 0 for size in case.group_sizes)
    elements = used * (case.K + case.N) + matrices * case.N * case.K
    return elements * jnp.dtype(case.dtype).itemsize, 2.0 * used * case.N * case.K
