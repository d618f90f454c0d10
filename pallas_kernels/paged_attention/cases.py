"""Paged attention: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

LAYER = 1  # of the two that the caches have

# Largest difference in one element, relative to 1 + |expected|. The outputs are averages of
# standard normal values, so this is a few units in the last place of the stored weights.
TOLERANCE = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """One batch: heads of a model (or of its shard), and `(queries, tokens in the cache)` pairs."""

    heads: int
    kv_heads: int
    head_dim: int
    sequences: Sequence[tuple[int, int]]
    _: dataclasses.KW_ONLY
    block_size: int = 64
    sliding_window: int | None = None
    soft_cap: float | None = None
    padding_rows: int = 0  # rows of q past the last sequence
    max_query_len: int | None = None  # None: the longest there is
    max_model_len: int = 0  # the block tables are this wide, in tokens, if not wider
    drafts: tuple[tuple[int, ...], ...] = ()
    """Of each sequence the parents of its last tokens, if they are a draft that is a tree."""


# (query heads, key/value heads, head_dim) of a model, or of one of its tensor-parallel shards
LLAMA_8B = (32, 8, 128)
LLAMA_8B_TP4 = (8, 2, 128)
LLAMA_70B_TP8 = (8, 1, 128)
QWEN3_06B_TP4 = (4, 2, 128)
QWEN3_32B = (64, 8, 128)
SMOLLM2_135M = (9, 3, 64)
GEMMA_2B = (8, 1, 256)  # one key/value head
GEMMA2_9B_TP4 = (4, 2, 256)
GEMMA2_9B = (16, 8, 256)
PHI3_MINI_TP16 = (2, 2, 96)  # a head_dim the GPU kernel does not take


def _ragged(n: int, low: int, high: int) -> list[tuple[int, int]]:
    """Return `n` decode rows with contexts spread evenly from `low` to `high`, in mixed order."""
    lengths = np.linspace(low, high, n).astype(int)
    return [(1, int(length)) for length in np.random.default_rng(0).permutation(lengths)]


# Parents of drafted tokens, by index; -1 stands for the token before the draft.
TREES = ((-1, 0, 1, 0, -1, 4, 4), (-1, -1, 1))
LONG_TREE = (*range(-1, 15), 9, *range(16, 30))  # 31 tokens, two branches after the tenth

CASES = (
    # One query a sequence.
    Case("decode_llama_8b", *LLAMA_8B_TP4, [(1, 200), (1, 1), (0, 0), (1, 64)]),
    Case("decode_smollm2", *SMOLLM2_135M, [(1, 65), (1, 130)], race_detection=True),
    Case("decode_smollm2_fp32", *SMOLLM2_135M, [(1, 65), (1, 130)], dtype="float32"),
    Case("decode_qwen3_fp16", *QWEN3_06B_TP4, [(1, 129)], dtype="float16", race_detection=True),
    Case("decode_mqa", *GEMMA_2B, [(1, 70), (0, 0)]),
    Case("decode_window", *LLAMA_70B_TP8, [(1, 300), (1, 40)], sliding_window=70),
    Case("decode_gemma2", *GEMMA2_9B_TP4, [(1, 150)], sliding_window=64, soft_cap=5.0),
    Case("decode_block16", *LLAMA_70B_TP8, [(1, 50), (1, 147)], block_size=16),
    Case("decode_block32", *SMOLLM2_135M, [(1, 97)], block_size=32),
    Case("decode_head_dim_96", *PHI3_MINI_TP16, [(1, 100), (1, 3)]),
    Case("decode_long", *LLAMA_70B_TP8, [(1, 1500)]),
    # Contexts that thread blocks share, some of which find nothing to do.
    Case("splits_llama_8b", *LLAMA_8B_TP4, [(1, 600), (0, 0), (1, 1)], max_model_len=1024),
    Case("splits_gemma2", *GEMMA2_9B_TP4, [(1, 530)], sliding_window=200, soft_cap=5.0),
    Case("splits_smollm2", *SMOLLM2_135M, [(1, 70)], max_model_len=512, race_detection=True),
    Case(
        "splits_verify",
        *LLAMA_8B_TP4,
        [(4, 600), (2, 66), (0, 0), (1, 1)],
        max_model_len=1024,
        padding_rows=3,
    ),
    Case("splits_verify_mqa", *(20, 1, 64), [(3, 300)], max_model_len=1024, race_detection=True),
    # A few queries a sequence: the verification of drafts.
    Case("verify_llama_8b", *LLAMA_8B_TP4, [(4, 200), (2, 66), (0, 0), (1, 1)], padding_rows=3),
    Case("verify_smollm2", *SMOLLM2_135M, [(3, 65), (1, 90)], race_detection=True),
    Case("verify_window", *LLAMA_70B_TP8, [(5, 150)], sliding_window=3),
    Case("verify_parts", *LLAMA_70B_TP8, [(16, 130), (8, 66), (0, 0), (9, 9)], padding_rows=3),
    Case("verify_parts_window", *LLAMA_70B_TP8, [(10, 150)], sliding_window=3),
    Case(
        "splits_verify_parts", *LLAMA_8B_TP4, [(17, 500)], max_model_len=1024, race_detection=True
    ),
    # The verification of drafts that are trees.
    Case("tree_llama_8b", *LLAMA_8B_TP4, [(8, 130), (4, 66), (0, 0), (1, 1)], drafts=TREES),
    Case("tree_smollm2", *SMOLLM2_135M, [(5, 66)], drafts=((-1, 0, 0, -1),), race_detection=True),
    Case(
        "tree_window",
        *(2, 1, 64),
        [(32, 100), (2, 40)],
        sliding_window=33,
        drafts=(LONG_TREE, (-1,)),
    ),
    Case("tree_parts", *LLAMA_8B_TP4, [(32, 120), (8, 70)], drafts=(LONG_TREE, TREES[0])),
    Case("splits_tree", *(4, 1, 64), [(8, 300), (1, 9)], max_model_len=1024, drafts=TREES[:1]),
    Case(
        "tree_narrowed",
        *SMOLLM2_135M,
        [(1, 100), (1, 65), (0, 0)],
        sliding_window=34,
        drafts=(LONG_TREE, (-1, 0, -1)),
    ),
    Case(
        "mixed_tree",
        *(2, 1, 64),
        [(100, 130), (8, 70), (1, 9), (32, 45)],
        drafts=((), TREES[0], (), LONG_TREE),
        padding_rows=5,
    ),
    Case(
        "mixed_tree_window",
        *(2, 1, 64),
        [(120, 120), (32, 70)],
        sliding_window=40,
        drafts=((), LONG_TREE),
        race_detection=True,
    ),
    # Prompt chunks, alone and beside decode rows.
    Case("prefill_llama_70b", *(4, 1, 128), [(200, 200)]),
    Case("prefill_smollm2", *SMOLLM2_135M, [(70, 70)], padding_rows=58, race_detection=True),
    Case("prefill_history", *(4, 2, 128), [(100, 300)]),
    Case(
        "mixed_llama_70b",
        *(4, 1, 128),
        [(1, 90), (70, 200), (0, 0), (1, 1), (130, 130), (3, 64)],
        padding_rows=19,
    ),
    Case("mixed_smollm2_block16", *SMOLLM2_135M, [(20, 33), (1, 18), (66, 66)], block_size=16),
    # Many items for a thread block, whose queries and results come and go meanwhile.
    Case(
        "mixed_many_chunks",
        *(2, 1, 64),
        [(40, 40)] + [(3, 30 + i) for i in range(16)],
        race_detection=True,
    ),
    Case(
        "prefill_gemma2",
        *GEMMA2_9B_TP4,
        [(90, 140)],
        sliding_window=40,
        soft_cap=5.0,
        race_detection=True,
    ),
    Case("prefill_fp16", *(2, 1, 128), [(65, 65)], dtype="float16"),
    Case("prefill_window", *(2, 1, 64), [(300, 300)], sliding_window=64),
    Case("prefill_fp32", *SMOLLM2_135M, [(70, 90), (1, 5)], dtype="float32"),
    # What the H200 is measured on.
    Case("decode_llama_8b_b64_2k", *LLAMA_8B, [(1, 2048)] * 64, tags="bench"),
    Case("decode_llama_8b_b1_1k", *LLAMA_8B, [(1, 1024)], tags="bench", max_model_len=131072),
    Case("decode_llama_8b_b1_4k", *LLAMA_8B, [(1, 4096)], tags="bench", max_model_len=131072),
    Case("decode_llama_8b_b1_32k", *LLAMA_8B, [(1, 32768)], tags="bench", max_model_len=131072),
    Case("decode_llama_8b_b16_1k", *LLAMA_8B, [(1, 1024)] * 16, tags="bench", max_model_len=131072),
    Case("decode_llama_8b_b16_8k", *LLAMA_8B, [(1, 8192)] * 16, tags="bench"),
    Case("decode_llama_8b_b64_1k", *LLAMA_8B, [(1, 1024)] * 64, tags="bench", max_model_len=8448),
    Case("decode_llama_8b_b256_1k", *LLAMA_8B, [(1, 1024)] * 256, tags="bench"),
    Case("decode_llama_8b_ragged", *LLAMA_8B, _ragged(64, 100, 6000), tags="bench"),
    Case("decode_llama_8b_block16", *LLAMA_8B, [(1, 2048)] * 64, tags="bench", block_size=16),
    Case("decode_qwen3_32b_b64_2k", *QWEN3_32B, [(1, 2048)] * 64, tags="bench"),
    Case("decode_llama_70b_tp8", *LLAMA_70B_TP8, [(1, 4096)] * 64, tags="bench"),
    Case("decode_smollm2_b128_2k", *SMOLLM2_135M, [(1, 2048)] * 128, tags="bench"),
    Case("decode_gemma2_9b", *GEMMA2_9B, [(1, 4096)] * 32, tags="bench", soft_cap=50.0),
    Case("verify_llama_8b_k3", *LLAMA_8B, [(4, 2048)] * 64, tags="bench"),
    Case("verify_llama_8b_k7", *LLAMA_8B, [(8, 2048)] * 64, tags="bench"),
    Case("tree_llama_8b_k7", *LLAMA_8B, [(8, 2048)] * 64, tags="bench", drafts=TREES[:1] * 64),
    Case("verify_llama_8b_b1_k16", *LLAMA_8B, [(17, 1024)], tags="bench"),
    Case("verify_qwen3_32b_k15", *QWEN3_32B, [(16, 2048)] * 16, tags="bench"),
    Case("prefill_llama_8b_8k", *LLAMA_8B, [(8192, 8192)], tags="bench"),
    Case("prefill_llama_8b_1k", *LLAMA_8B, [(1024, 1024)] + [(0, 0)] * 255, tags="bench"),
    Case("prefill_llama_8b_8x1k", *LLAMA_8B, [(1024, 1024)] * 8 + [(0, 0)] * 248, tags="bench"),
    Case("prefill_llama_8b_4x2k", *LLAMA_8B, [(2048, 2048)] * 4, tags="bench"),
    Case("prefill_llama_8b_history", *LLAMA_8B, [(2048, 32768)], tags="bench"),
    Case("prefill_smollm2_8k", *SMOLLM2_135M, [(8192, 8192)], tags="bench"),
    Case("mixed_llama_8b", *LLAMA_8B, [(1, 2048)] * 63 + [(2048, 4096)], tags="bench"),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the positional and keyword arguments of `op.paged_attention` for a case.

    Blocks are shuffled over a pool larger than needed. With `poison`, everything that must not be
    read as data is NaN in the keys and `poison` in the values: the other layer, the unused blocks,
    and the slots past a sequence's length inside its last block.
    """
    rng = np.random.default_rng(seed)
    query_lens = np.array([queries for queries, _ in case.sequences], np.int32)
    seq_lens = np.array([tokens for _, tokens in case.sequences], np.int32)
    blocks_of = -(-seq_lens // case.block_size)
    width = max(int(blocks_of.max()) + 1, case.max_model_len // case.block_size)
    pool = int(blocks_of.sum()) + 3
    order = rng.permutation(pool).astype(np.int32)
    tables = np.full((len(seq_lens), width), order[-1], np.int32)  # an unused block
    valid = np.zeros((pool, case.block_size), bool)
    used = 0
    for s, (count, tokens) in enumerate(zip(blocks_of, seq_lens, strict=True)):
        tables[s, :count] = order[used : used + count]
        used += int(count)
        slots = np.arange(count * case.block_size).reshape(count, case.block_size)
        valid[tables[s, :count]] = slots < tokens
    max_query_len = case.max_query_len or max(1, int(query_lens.max()))
    if max_query_len == 1:  # row s is sequence s, an empty slot has a row as well
        rows, starts = len(seq_lens), np.arange(len(seq_lens) + 1, dtype=np.int32)
    else:
        starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
        rows = int(starts[-1]) + case.padding_rows
    keys = jax.random.split(jax.random.key(seed), 3)
    dtype = jnp.dtype(case.dtype)
    cache = (2, pool, case.kv_heads, case.block_size, case.head_dim)
    q = jax.random.normal(keys[0], (rows, case.heads, case.head_dim), dtype)
    k_cache = jax.random.normal(keys[1], cache, dtype)
    v_cache = jax.random.normal(keys[2], cache, dtype)
    if poison is not None:
        mask = jnp.asarray(valid)[:, None, :, None]
        mask = mask & (jnp.arange(2) == LAYER)[:, None, None, None, None]
        k_cache = jnp.where(mask, k_cache, jnp.asarray(np.nan, dtype))
        v_cache = jnp.where(mask, v_cache, jnp.asarray(poison, dtype))
    indices = [np.int32(LAYER), tables, starts, seq_lens]
    if case.drafts:
        indices.append(_draft_mask(case, rows, starts))
    indices = map(jnp.asarray, indices)
    keywords = {
        "max_query_len": max_query_len,
        "scale": case.head_dim**-0.5,
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
    }
    return (q, k_cache, v_cache, *indices), keywords


def _draft_mask(case: Case, rows: int, starts: np.ndarray) -> np.ndarray:
    """Return the masks of all queries; a single query of a tree is the tree's last token."""
    mask = np.full(rows, -1, np.int32)
    for (queries, _), begin, parents in zip(case.sequences, starts, case.drafts, strict=False):
        for token in range(max(len(parents) - queries, 0), len(parents)):
            hidden = set(range(token))
            ancestor = token
            while ancestor >= 0:
                hidden.discard(ancestor)
                ancestor = parents[ancestor]
            mask[begin + queries - len(parents) + token] -= sum(1 << token - h for h in hidden)
    return mask


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return the output in float64, one query and head at a time; NaN where it is unspecified."""
    q, k_cache, v_cache, layer, tables, starts, seq_lens, *mask = (np.asarray(a) for a in arguments)
    out = np.full(q.shape, np.nan, np.float64)
    group = case.heads // case.kv_heads
    for s, length in enumerate(seq_lens):
        last = starts[s] + (length > 0) if keywords["max_query_len"] == 1 else starts[s + 1]
        k, v = (
            np.swapaxes(cache[layer, tables[s]], 1, 2).reshape(-1, case.kv_heads, case.head_dim)[
                :length
            ]
            for cache in (k_cache.astype(np.float64), v_cache.astype(np.float64))
        )
        for row in range(starts[s], last):
            position = length - (last - row)
            seen = np.arange(position + 1)
            if mask:
                bit = np.minimum(position - seen, 31)
                seen = seen[(mask[0][row].astype(np.int64) >> bit) & 1 > 0]
            if case.sliding_window is not None:
                seen = seen[-case.sliding_window :]
            for head in range(case.heads):
                scores = k[seen, head // group] @ q[row, head].astype(np.float64)
                scores = scores * keywords["scale"]
                if case.soft_cap is not None:
                    scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                weights = np.exp(scores - scores.max())
                out[row, head] = weights / weights.sum() @ v[seen, head // group]
    return out


def comparable(case: Case, output: jax.Array, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return the output as float64; every row must be finite except the padding rows."""
    out = np.asarray(output).astype(np.float64)
    rows = len(out) - case.padding_rows
    if not np.isfinite(out[:rows]).all():
        raise AssertionError(f"{case.name}: not finite in rows {np.where(np.isnan(out))[0]}")
    return (out,)


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with the output as queries, so that calls run one after another."""
    return (output, *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved and the floating-point operations that must be done."""
    itemsize = jnp.dtype(case.dtype).itemsize
    window = case.sliding_window or 1 << 40
    tokens = sum(min(length, window + queries - 1) for queries, length in case.sequences)
    rows = sum(queries for queries, _ in case.sequences)
    elements = 2 * tokens * case.kv_heads + 2 * rows * case.heads
    pairs = sum(
        min(position + 1, window)
        for queries, length in case.sequences
        for position in range(length - queries, length)
    )
    return elements * case.head_dim * itemsize, 4.0 * pairs * case.heads * case.head_dim
