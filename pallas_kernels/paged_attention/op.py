"""Paged attention: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float, Int

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.paged_attention import mosaic_gpu, mosaic_gpu_prefill, reference
from arctic_jax.pallas_kernels.paged_attention.reference import MASK_BITS


def paged_attention(
    q: Float[Array, "T H D"],
    k_cache: Float[Array, "layers blocks KV block_size D"],
    v_cache: Float[Array, "layers blocks KV block_size D"],
    layer: Int[Array, ""],
    block_tables: Int[Array, "S B"],
    query_start_loc: Int[Array, " S+1"],
    seq_lens: Int[Array, " S"],
    draft_mask: Int[Array, " T"] | None = None,
    *,
    max_query_len: int,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "T H D"]:
    """Causal attention of a ragged batch of queries over the blocks of their sequences.

    Sequence `s` has the queries `q[query_start_loc[s]:query_start_loc[s + 1]]`, its last ones: the
    final query sits at position `seq_lens[s] - 1` and all keys and values, those of the queries
    included, are already in the cache. Prompt chunks, decode steps and draft verification are
    therefore one operation. Heads `[g * H/KV, (g + 1) * H/KV)` share key/value head `g`.

    H and KV may be shards of the model's heads; no other axis may be sharded.

    Args:
        q: queries, rotated, of all sequences one after another.
        k_cache: keys of all layers, one contiguous `[block_size, D]` tile a block and head.
        v_cache: values, likewise.
        layer: whose keys and values.
        block_tables: block ids of each sequence in order; entries past its length are not read
            as data but must be valid ids.
        query_start_loc: where each sequence's queries begin, non-decreasing, ends with the number
            of real queries. Rows of `q` past it are padding: their output is unspecified.
        seq_lens: tokens in the cache for each sequence; 0 for an empty slot.
        draft_mask: which of the tokens before it a query sees, for drafts that are trees. Bit `i`
            stands for the key `i` places before the query's own (bit 0: its own, which is seen),
            the sign bit for all that are farther away, which are seen. -1 sees them all, and so do
            all queries without this argument.
        max_query_len: static bound on the queries of one sequence. 1 means a decode batch, where
            T == S and row `s` is the query of sequence `s`.
        scale: factor on the scores.
        sliding_window: a query sees this many keys, itself included; `None` for all. Keys that
            its `draft_mask` hides do not count. At least 32 beside one.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
        implementation: see `dispatch.resolve`.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    T, H, D = q.shape
    S, _ = block_tables.shape
    KV = k_cache.shape[2]
    if k_cache.shape != v_cache.shape or k_cache.shape[4] != D:
        raise ValueError(f"{q.shape=}, {k_cache.shape=} and {v_cache.shape=} do not fit")
    if H % KV:
        raise ValueError(f"{H} query heads are not a multiple of {KV} key/value heads")
    if query_start_loc.shape != (S + 1,) or seq_lens.shape != (S,):
        raise ValueError(f"{query_start_loc.shape=}, {seq_lens.shape=}, {block_tables.shape=}")
    if max_query_len < 1 or (max_query_len == 1 and T != S):
        raise ValueError(f"{max_query_len=} with {T} queries of {S} sequences")
    if draft_mask is not None and draft_mask.shape != (T,):
        raise ValueError(f"{draft_mask.shape=} with {T} queries")
    least = 1 if draft_mask is None else MASK_BITS
    if sliding_window is not None and sliding_window < least:
        raise ValueError(f"{sliding_window=} must be at least {least}, or None")
    arrays = (q, k_cache, v_cache, layer, block_tables, query_start_loc, seq_lens, draft_mask)
    options = {
        "max_query_len": max_query_len,
        "scale": scale,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
    }
    reason = mosaic_gpu_unsupported(*arrays, **options)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("paged_attention", implementation, preferred)
    if chosen == "xla":
        return reference.paged_attention(*arrays, **options)
    if reason:
        raise ValueError(f"paged_attention: implementation='mosaic_gpu' cannot do this: {reason}")
    few = mosaic_gpu.takes(max_query_len, H // KV)
    kernel = mosaic_gpu.decode if few else mosaic_gpu_prefill.mixed
    return kernel(*arrays, **options, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(q: Array, k_cache: Array, *_: Array | None, **__: object) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `paged_attention`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(q, k_cache)
