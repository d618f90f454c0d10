"""Segment attention: the named shapes that tests and benchmarks run, and the float64 formula.

The same names as in `paged_attention/cases.py`, read by the same test and the same benchmark.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference in one element, relative to 1 + |expected|: the roundings of the weights and
# of the output; values are near 1.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Windows that hold segments of the lengths given, one after another, and padding."""

    name: str
    tags: frozenset[str]
    windows: tuple[tuple[int, ...], ...]
    window: int
    heads: int
    head_dim: int
    dtype: str = "bfloat16"
    kv_heads: int | None = None
    causal: bool = False
    race_detection: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.windows) * self.window


def _case(name, windows, window, heads, head_dim, tags="ci", **more) -> Case:
    return Case(name, frozenset(tags.split()), windows, window, heads, head_dim, **more)


CASES = (
    _case("minilm_one_token", ((1,),), 16, 12, 32, dtype="float32"),
    _case("minilm_full_window", ((64,), (64,)), 64, 12, 32),
    _case("minilm_mixed", ((100, 20, 8), (1, 3, 90), (128,)), 128, 12, 32, dtype="float32"),
    _case("arctic_m_mixed", ((50, 50, 20), (7, 64)), 128, 12, 64),
    _case("arctic_m_512", ((512,),), 512, 2, 64, dtype="float16"),
    _case("head_dim_8", ((5, 6), (11,)), 16, 3, 8, dtype="float32"),
    _case("causal", ((30, 20, 8), (64,)), 64, 4, 16, dtype="float32", causal=True),
    _case("qwen3_embedding", ((70, 50), (1, 127)), 128, 16, 128, kv_heads=8, causal=True),
    _case("arctic_m_50", ((50,) * 10,) * 32, 512, 12, 64, "bench"),
    _case("arctic_m_512_full", ((512,),) * 32, 512, 12, 64, "bench"),
    _case("minilm_256", ((256,),) * 64, 256, 12, 32, "bench"),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.segment_attention`; padding holds `poison`."""
    keys = jax.random.split(jax.random.key(seed), 3)
    kv_heads = case.kv_heads or case.heads
    shapes = [(case.tokens, heads, case.head_dim) for heads in (case.heads, kv_heads, kv_heads)]
    ids = _segment_ids(case)
    arrays = [
        jax.random.normal(key, shape, jnp.dtype(case.dtype))
        for key, shape in zip(keys, shapes, strict=True)
    ]
    if poison is not None:
        arrays = [jnp.where((ids < 0)[:, None, None], poison, x).astype(x.dtype) for x in arrays]
    keywords = {"window": case.window, "scale": case.head_dim**-0.5, "causal": case.causal}
    return (*arrays, jnp.asarray(ids)), keywords


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return the output in float64, NaN for padding, segment by segment."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in arguments[:3])
    k, v = (np.repeat(x, case.heads // x.shape[1], axis=1) for x in (k, v))
    out = np.full_like(q, np.nan)
    for number, lengths in enumerate(case.windows):
        start = number * case.window
        for length in lengths:
            rows = slice(start, start + length)
            scores = np.einsum("qhd,khd->hqk", q[rows], k[rows]) * keywords["scale"]
            if keywords["causal"]:
                scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[rows] = np.einsum("hqk,khd->qhd", weights, v[rows])
            start += length
    return out


def comparable(case: Case, output: jax.Array, arguments: tuple) -> tuple[np.ndarray]:
    """Return the output as float64; that of segments must be finite."""
    array = np.asarray(output).astype(np.float64)
    if not np.isfinite(array[np.asarray(arguments[3]) >= 0]).all():
        raise AssertionError(f"{case.name}: not finite")
    return (array,)


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with the output as queries: calls run one after another."""
    return (output, *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved and the floating-point operations that must be done."""
    heads, kv_heads = case.heads, case.kv_heads or case.heads
    squares = float(sum(length**2 for lengths in case.windows for length in lengths))
    squares /= 2 if case.causal else 1
    moved = 2.0 * (heads + kv_heads) * case.tokens * case.head_dim
    return moved * jnp.dtype(case.dtype).itemsize, 4.0 * squares * heads * case.head_dim


def _segment_ids(case: Case) -> np.ndarray:
    ids = np.full((len(case.windows), case.window), -1, np.int32)
    for number, lengths in enumerate(case.windows):
        row = np.repeat(np.arange(len(lengths)), lengths)
        ids[number, : len(row)] = row
    return ids.reshape(-1)
