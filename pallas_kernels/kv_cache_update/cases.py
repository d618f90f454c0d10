"""Key/value cache update: the named shapes that tests and benchmarks run, and the float64 formula.

The same names as in `paged_attention/cases.py`, read by the same test and the same benchmark.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference in one element, relative to 1 + |expected|: one rounding of the stored dtype.
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """`tokens` new tokens, every `padding_every`-th of them padding, into a pool of blocks."""

    name: str
    tags: frozenset[str]
    tokens: int
    kv_heads: int
    head_dim: int
    blocks: int
    block_size: int = 64
    dtype: str = "bfloat16"
    padding_every: int = 0
    contiguous: bool = False  # one chunk of a prompt, not one token of each sequence
    race_detection: bool = False


def _case(name: str, tokens: int, heads: tuple[int, int], blocks: int, tags="ci", **more) -> Case:
    return Case(name, frozenset(tags.split()), tokens, *heads, blocks, **more)


CASES = (
    _case("decode_llama_8b", 5, (8, 128), 6, padding_every=3),
    _case("decode_smollm2", 3, (3, 64), 4, race_detection=True),
    _case("decode_mqa", 2, (1, 256), 3),
    _case("decode_all_padding", 2, (2, 128), 2, padding_every=1),
    _case("decode_block16_fp16", 4, (2, 128), 9, block_size=16, dtype="float16"),
    _case("decode_fp32", 4, (3, 64), 5, dtype="float32", padding_every=2),
    _case("decode_head_dim_96", 3, (2, 96), 4),
    _case("chunk_llama_8b", 67, (2, 128), 4, padding_every=7, contiguous=True),
    _case("decode_llama_8b_b64", 64, (8, 128), 512, "bench"),
    _case("decode_llama_8b_b256", 256, (8, 128), 512, "bench"),
    _case("chunk_llama_8b_8k", 8192, (8, 128), 512, "bench", contiguous=True),
    _case("chunk_smollm2_8k", 8192, (3, 64), 512, "bench", contiguous=True),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.kv_cache_update`; with `poison` the old caches hold NaN."""
    rng = np.random.default_rng(seed)
    pool = case.blocks * case.block_size
    if case.contiguous:
        start = int(rng.integers(pool - case.tokens))
        slots = np.arange(start, start + case.tokens, dtype=np.int32)
    else:
        slots = rng.choice(pool, case.tokens, replace=False).astype(np.int32)
    if case.padding_every:
        slots[:: case.padding_every] = -1
    keys = jax.random.split(jax.random.key(seed), 5)
    dtype = jnp.dtype(case.dtype)
    new = (case.tokens, case.kv_heads, case.head_dim)
    cache = (case.blocks, case.kv_heads, case.block_size, case.head_dim)
    k, v = jax.random.normal(keys[0], new, dtype), jax.random.normal(keys[1], new, dtype)
    if poison is None:
        k_cache = jax.random.normal(keys[2], cache, dtype)
        v_cache = jax.random.normal(keys[3], cache, dtype)
    else:
        k_cache, v_cache = jnp.full(cache, np.nan, dtype), jnp.full(cache, np.nan, dtype)
    angles = jax.random.uniform(keys[4], (case.tokens, case.head_dim // 2), maxval=2 * np.pi)
    return (k, v, jnp.cos(angles), jnp.sin(angles), k_cache, v_cache, jnp.asarray(slots)), {}


def expected(case: Case, arguments: tuple, keywords: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return both caches in float64, written one token at a time."""
    del keywords
    k, v, cos, sin, k_cache, v_cache = (np.asarray(a).astype(np.float64) for a in arguments[:6])
    half = case.head_dim // 2
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    for t, slot in enumerate(np.asarray(arguments[6])):
        if slot < 0:
            continue
        block, offset = divmod(int(slot), case.block_size)
        for head in range(case.kv_heads):
            first, second = k[t, head, :half], k[t, head, half:]
            k_cache[block, head, offset, :half] = first * cos[t] - second * sin[t]
            k_cache[block, head, offset, half:] = second * cos[t] + first * sin[t]
            v_cache[block, head, offset] = v[t, head]
    return k_cache, v_cache


def comparable(case: Case, output: tuple, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return both caches as float64; slots that no token owns must be bit for bit the old ones."""
    touched = np.zeros(case.blocks * case.block_size, bool)
    slots = np.asarray(arguments[6])
    touched[slots[slots >= 0]] = True
    old_slots = ~touched.reshape(case.blocks, case.block_size)
    for new, old in zip(output, arguments[4:6], strict=True):
        new, old = (np.swapaxes(np.asarray(a), 1, 2)[old_slots] for a in (new, old))
        if new.tobytes() != old.tobytes():
            raise AssertionError(f"{case.name}: a slot without a token was written")
    return tuple(np.asarray(cache).astype(np.float64) for cache in output)


def following(arguments: tuple, output: tuple) -> tuple:
    """Return `arguments` with the caches that a call returned, for the next call."""
    return (*arguments[:4], *output, arguments[6])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved (new keys and values in and out) and 0 operations."""
    elements = 4 * case.tokens * case.kv_heads * case.head_dim
    return elements * jnp.dtype(case.dtype).itemsize + 4 * case.tokens * case.head_dim, 0.0
