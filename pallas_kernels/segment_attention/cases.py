"""Segment attention: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

# Largest difference in one element, relative to 1 + |expected|: the roundings of the weights and
# of the output; values are near 1.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """Windows that hold segments of the lengths given, one after another, and padding."""

    windows: tuple[tuple[int, ...], ...]
    window: int
    heads: int
    head_dim: int
    _: dataclasses.KW_ONLY
    kv_heads: int | None = None
    causal: bool = False

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.kv_heads or self.heads

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.windows) * self.window


def _mixed(windows: int, window: int) -> tuple[tuple[int, ...], ...]:
    """Log-normal lengths of 16 to `window`, each window filled until the next does not fit."""
    draw = np.random.default_rng(0)
    filled: list[tuple[int, ...]] = [()]
    while True:
        length = int(np.clip(draw.lognormal(4.5, 0.9), 16, window))
        if sum(filled[-1]) + length <= window:
            filled[-1] += (length,)
        elif len(filled) == windows:
            return tuple(filled)
        else:
            filled.append((length,))


CASES = (
    Case("minilm_one_token", ((1,),), 16, 12, 32, dtype="float32"),
    Case("minilm_full_window", ((64,), (64,)), 64, 2, 32),
    Case("minilm_mixed", ((100, 20, 8), (1, 3, 90), (128,)), 128, 12, 32, dtype="float32"),
    Case("arctic_m_mixed", ((50, 50, 20), (7, 64)), 128, 3, 64, race_detection=True),
    Case("arctic_m_512", ((512,),), 512, 1, 64, dtype="float16"),
    Case("long_among_short", ((10, 300, 60, 1), (384,)), 384, 1, 64),
    Case("head_dim_8", ((5, 6), (11,)), 16, 3, 8, dtype="float32"),
    Case("causal", ((30, 20, 8), (64,)), 64, 4, 16, dtype="float32", causal=True),
    Case("qwen3_embedding", ((70, 50), (1, 127)), 128, 2, 128, kv_heads=1, causal=True),
    Case("causal_long", ((256,),), 256, 1, 64, causal=True),
    Case("arctic_m_50", ((50,) * 10,) * 64, 512, 12, 64, tags="bench"),
    Case("arctic_m_50_narrow", ((50,),) * 640, 64, 12, 64, tags="bench"),
    Case("arctic_m_512_full", ((512,),) * 64, 512, 12, 64, tags="bench"),
    Case("arctic_m_lognormal", _mixed(64, 512), 512, 12, 64, tags="bench"),
    Case("minilm_256", ((256,),) * 128, 256, 12, 32, tags="bench"),
    Case("qwen3_512", ((512,),) * 16, 512, 16, 128, tags="bench", kv_heads=8, causal=True),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.segment_attention`; padding holds `poison`, if finite, or 1e4."""
    heads = case.heads + 2 * case.num_kv_heads
    shape = (case.tokens, heads, case.head_dim)
    qkv = jax.random.normal(jax.random.key(seed), shape, jnp.dtype(case.dtype))
    bounds, is_padding = _bounds(case)
    if poison is not None:
        poison = poison if math.isfinite(poison) else 1e4
        qkv = jnp.where(is_padding[:, None, None], poison, qkv).astype(qkv.dtype)
    keywords = {
        "num_kv_heads": case.num_kv_heads,
        "window": case.window,
        "scale": case.head_dim**-0.5,
        "causal": case.causal,
    }
    return (qkv, jnp.asarray(bounds)), keywords


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return the output in float64, NaN for padding, segment by segment."""
    qkv = np.asarray(arguments[0]).astype(np.float64)
    q, k, v = np.split(qkv, (case.heads, case.heads + case.num_kv_heads), axis=1)
    k, v = (np.repeat(x, case.heads // case.num_kv_heads, axis=1) for x in (k, v))
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
    if not np.isfinite(array[~_bounds(case)[1]]).all():
        raise AssertionError(f"{case.name}: not finite")
    return (array,)


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with a row of the output as a query: calls run one after another."""
    qkv, bounds = arguments
    return qkv.at[0, 0].set(output[0, 0]), bounds


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved and the floating-point operations that must be done."""
    squares = float(sum(length**2 for lengths in case.windows for length in lengths))
    squares /= 2 if case.causal else 1
    moved = 2.0 * (case.heads + case.num_kv_heads) * case.tokens * case.head_dim
    return moved * jnp.dtype(case.dtype).itemsize, 4.0 * squares * case.heads * case.head_dim


def _bounds(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return where each token's segment begins and ends, `[2, T]`, and which ones are padding."""
    starts = np.arange(case.tokens, dtype=np.int32)
    stops, is_padding = starts + 1, np.ones(case.tokens, bool)
    for number, lengths in enumerate(case.windows):
        start = number * case.window
        for length in lengths:
            rows = slice(start, start + length)
            starts[rows], stops[rows], is_padding[rows] = start, start + length, False
            start += length
    return np.stack([starts, stops]), is_padding
