"""Key/value cache update: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

LAYER = 1  # the first that is written; the one before it is not

# Largest difference in one element, relative to 1 + |expected|: one rounding of the stored dtype.
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """`tokens` new tokens, every `padding_every`-th of them padding, into a pool of blocks."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    _: dataclasses.KW_ONLY
    layers: int = 1
    block_size: int = 64
    padding_every: int = 0
    contiguous: bool = False  # one chunk of a prompt, not one token of each sequence
    norm: bool = False  # of queries and keys


# (query heads, key/value heads, head_dim) of a model, or of one of its tensor-parallel shards
LLAMA_8B = (32, 8, 128)
LLAMA_8B_TP4 = (8, 2, 128)
LLAMA_8B_KV = (0, 8, 128)  # keys and values alone, of several layers in one projection
QWEN3_06B_TP4 = (4, 2, 128)
QWEN3_8B = (32, 8, 128)
SMOLLM2_135M = (9, 3, 64)
GEMMA_2B = (8, 1, 256)
PHI3_MINI_TP16 = (2, 2, 96)  # a head_dim the GPU kernel does not take

CASES = (
    Case("decode_llama_8b", 5, *LLAMA_8B, 6, padding_every=3),
    Case("decode_smollm2", 3, *SMOLLM2_135M, 4, race_detection=True),
    Case("decode_mqa", 2, *GEMMA_2B, 3),
    Case("decode_all_padding", 2, *LLAMA_8B_TP4, 2, padding_every=1),
    Case("decode_block16_fp16", 4, *LLAMA_8B_TP4, 9, block_size=16, dtype="float16"),
    Case("decode_fp32", 4, *SMOLLM2_135M, 5, dtype="float32", padding_every=2),
    Case("decode_qwen3", 6, *QWEN3_06B_TP4, 5, norm=True, padding_every=4, race_detection=True),
    Case("decode_head_dim_96", 3, *PHI3_MINI_TP16, 4),
    Case("decode_head_dim_192", 3, *(4, 2, 192), 4, dtype="float16", norm=True),
    Case("decode_layers", 5, *(0, 2, 128), 4, layers=3, padding_every=4, race_detection=True),
    Case("decode_layers_qwen3", 3, *(2, 2, 64), 4, layers=2, norm=True, dtype="float32"),
    Case("chunk_llama_8b", 67, *LLAMA_8B_TP4, 4, padding_every=7, contiguous=True),
    Case("chunk_layers", 41, *(0, 2, 64), 3, layers=2, contiguous=True),
    Case("decode_llama_8b_b1", 1, *LLAMA_8B, 130, tags="bench"),
    Case("decode_llama_8b_b16", 16, *LLAMA_8B, 130, tags="bench"),
    Case("decode_llama_8b_b64", 64, *LLAMA_8B, 130, tags="bench"),
    Case("decode_llama_8b_b256", 256, *LLAMA_8B, 130, tags="bench"),
    Case("decode_qwen3_8b_b64", 64, *QWEN3_8B, 130, tags="bench", norm=True),
    Case("decode_16_layers_b64", 64, *LLAMA_8B_KV, 16, tags="bench", layers=16),
    Case("chunk_llama_8b_8k", 8192, *LLAMA_8B, 130, tags="bench", contiguous=True),
    Case("chunk_qwen3_8b_8k", 8192, *QWEN3_8B, 130, tags="bench", contiguous=True, norm=True),
    Case("chunk_smollm2_8k", 8192, *SMOLLM2_135M, 130, tags="bench", contiguous=True),
    Case("chunk_16_layers_8k", 8192, *LLAMA_8B_KV, 130, tags="bench", layers=16, contiguous=True),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.kv_cache_update`; with `poison` the old caches hold NaN.

    Here and there a value is not finite, as in the projection of a damaged token.
    """
    rng = np.random.default_rng(seed)
    pool = case.blocks * case.block_size
    if case.contiguous:
        start = int(rng.integers(pool - case.tokens))
        slots = np.arange(start, start + case.tokens, dtype=np.int32)
    else:
        slots = rng.choice(pool, case.tokens, replace=False).astype(np.int32)
    if case.padding_every:
        slots[:: case.padding_every] = -1
    dtype = jnp.dtype(case.dtype)
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    rows = case.heads // case.kv_heads + 2
    shape = (case.tokens, case.kv_heads, case.layers, rows, case.head_dim)
    qkv = jax.random.normal(next(keys), shape, dtype)
    damaged = rng.choice([np.nan, np.inf, -np.inf], case.layers)
    qkv = qkv.at[-1, -1, :, -1, 3].set(jnp.asarray(damaged, dtype)).at[0, 0, 0, -1].set(np.nan)
    angles = jax.random.uniform(next(keys), (case.tokens, case.head_dim // 2), maxval=2 * np.pi)
    cache = (LAYER + case.layers, case.blocks, case.kv_heads, case.block_size, case.head_dim)
    caches = [
        jax.random.normal(next(keys), cache, dtype)
        if poison is None
        else jnp.full(cache, np.nan, dtype)
        for _ in "kv"
    ]
    arguments = (
        qkv,
        jnp.cos(angles),
        jnp.sin(angles),
        *caches,
        jnp.int32(LAYER),
        jnp.asarray(slots),
    )
    if not case.norm:
        return arguments, {}
    weight = (case.layers, case.head_dim)
    q_norm, k_norm = (1 + jax.random.normal(next(keys), weight, dtype) / 4 for _ in range(2))
    return arguments, {"q_norm": q_norm, "k_norm": k_norm, "epsilon": 1e-6}


def expected(case: Case, arguments: tuple, keywords: dict) -> tuple[np.ndarray, ...]:
    """Return the queries and the caches in float64, written one token at a time."""
    qkv, cos, sin = (np.asarray(a).astype(np.float64) for a in arguments[:3])
    k_cache, v_cache = (np.asarray(cache).astype(np.float64) for cache in arguments[3:5])
    half = case.head_dim // 2

    def rotated(x: np.ndarray, token: int, layer: int, norm: str) -> np.ndarray:
        if case.norm:
            x = x / np.sqrt((x * x).mean() + keywords["epsilon"])
            x = x * np.asarray(keywords[norm])[layer].astype(np.float64)
        first, second, c, s = x[:half], x[half:], cos[token], sin[token]
        return np.concatenate([first * c - second * s, second * c + first * s])

    queries = np.empty((case.tokens, case.layers * case.heads, case.head_dim))
    for token, slot in enumerate(np.asarray(arguments[6])):
        block, offset = divmod(int(slot), case.block_size)
        row = 0
        for head in range(case.kv_heads):
            for layer in range(case.layers):
                *group, k, v = qkv[token, head, layer]
                for q in group:
                    queries[token, row] = rotated(q, token, layer, "q_norm")
                    row += 1
                if slot >= 0:
                    place = (LAYER + layer, block, head, offset)
                    k_cache[place] = rotated(k, token, layer, "k_norm")
                    v_cache[place] = np.where(np.isfinite(v), v, 0)
    return queries, k_cache, v_cache


def comparable(case: Case, output: tuple, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return queries and caches as float64; slots that no token owns must be the old bit for bit.

    What the call wrote must be finite, that of the damaged values too.
    """
    touched = np.zeros((LAYER + case.layers, case.blocks * case.block_size), bool)
    slots = np.asarray(arguments[6])
    touched[LAYER:, slots[slots >= 0]] = True
    touched = touched.reshape(-1, case.blocks, case.block_size)
    for new, old in zip(output[1:], arguments[3:5], strict=True):
        new, old = (np.swapaxes(np.asarray(a), 2, 3) for a in (new, old))
        if new[~touched].tobytes() != old[~touched].tobytes():
            raise AssertionError(f"{case.name}: a slot without a token was written")
        if not np.isfinite(new[touched].astype(np.float32)).all():
            raise AssertionError(f"{case.name}: a slot of a token is not finite")
    if not np.isfinite(np.asarray(output[0]).astype(np.float32)).all():
        raise AssertionError(f"{case.name}: a query is not finite")
    return tuple(np.asarray(a).astype(np.float64) for a in output)


def following(arguments: tuple, output: tuple) -> tuple:
    """Return `arguments` with the caches that a call returned, for the next call."""
    return (*arguments[:3], *output[1:], *arguments[5:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (the projection in and out again) and 0 operations."""
    rows = case.heads + 2 * case.kv_heads
    elements = 2 * case.tokens * case.layers * rows * case.head_dim
    return elements * jnp.dtype(case.dtype).itemsize + 4 * case.tokens * case.head_dim, 0.0
