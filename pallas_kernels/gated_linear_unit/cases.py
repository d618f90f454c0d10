"""Gated linear unit: the named shapes that tests and benchmarks run, and the float64 formula.

The same names as in `paged_attention/cases.py`, read by the same test and the same benchmark.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference in one element, relative to 1 + |expected|: the roundings of both products, of
# the activation and of the result, each of them a number near 1.
TOLERANCE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """`tokens` times the fused weights `[shards, 2, columns, hidden]`."""

    name: str
    tags: frozenset[str]
    tokens: int
    shards: int
    columns: int
    hidden: int
    dtype: str = "bfloat16"
    bias: bool = False
    race_detection: bool = False


def _case(name: str, tokens: int, weight: tuple[int, int, int], tags="ci", **more) -> Case:
    return Case(name, frozenset(tags.split()), tokens, *weight, **more)


LLAMA_8B = (1, 14336, 4096)
LLAMA_70B_TP8 = (1, 3584, 8192)
QWEN3_06B = (1, 3072, 1024)

CASES = (
    _case("one_tile", 256, (1, 128, 128), race_detection=True),
    _case("one_step", 256, (1, 128, 64), race_detection=True),
    _case("tiles", 512, (1, 256, 320), race_detection=True),
    _case("two_shards", 264, (2, 256, 128)),
    _case("ragged_fp16", 200, (1, 128, 192), dtype="float16"),
    _case("odd_tokens", 3, (1, 128, 64)),
    _case("odd_columns", 8, (1, 96, 64)),
    _case("fp32", 8, (1, 128, 64), dtype="float32"),
    _case("bias", 8, (2, 128, 64), bias=True),
    _case("llama_8b_256", 256, LLAMA_8B, "bench"),
    _case("llama_8b_512", 512, LLAMA_8B, "bench"),
    _case("llama_8b_1k", 1024, LLAMA_8B, "bench"),
    _case("llama_8b_2k", 2048, LLAMA_8B, "bench"),
    _case("llama_8b_8k", 8192, LLAMA_8B, "bench"),
    _case("llama_70b_tp8_8k", 8192, LLAMA_70B_TP8, "bench"),
    _case("qwen3_06b_8k", 8192, QWEN3_06B, "bench"),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.gated_linear_unit`; all are read, so nothing is poisoned."""
    del poison
    keys = jax.random.split(jax.random.key(seed), 3)
    dtype, shape = jnp.dtype(case.dtype), (case.shards, 2, case.columns, case.hidden)
    x = jax.random.normal(keys[0], (case.tokens, case.hidden), dtype)
    weight = jax.random.normal(keys[1], shape, dtype) * jnp.asarray(case.hidden**-0.5, dtype)
    if not case.bias:
        return (x, weight), {}
    return (x, weight, jax.random.normal(keys[2], shape[:3], dtype)), {}


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return the gated products in float64, one shard after another."""
    del keywords
    x, weight, *bias = (np.asarray(a).astype(np.float64) for a in arguments)
    shards = []
    for shard in range(case.shards):
        gate, up = (x @ weight[shard, i].T + (bias[0][shard, i] if bias else 0) for i in range(2))
        shards.append(gate / (1 + np.exp(-gate)) * up)
    return np.concatenate(shards, axis=1)


def comparable(case: Case, output: jax.Array, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return the output as float64; all of it must be finite."""
    del arguments
    out = np.asarray(output).astype(np.float64)
    if not np.isfinite(out).all():
        raise AssertionError(f"{case.name}: not finite")
    return (out,)


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with a part of the output as tokens: calls run one after another."""
    x = jax.lax.slice(output, (0, 0), arguments[0].shape)
    return (x, *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved and the floating-point operations that must be done."""
    products = 2 * case.shards * case.columns
    elements = products * case.hidden + case.tokens * (case.hidden + products / 2)
    itemsize = jnp.dtype(case.dtype).itemsize
    return elements * itemsize, 2.0 * case.tokens * products * case.hidden
