"""Paged attention in plain jnp: the specification, and the implementation `"xla"`.

Keys are read a chunk of blocks at a time with a running softmax, accumulated in float32, up to the
longest sequence of the batch (a loop with a dynamic bound): so one program serves every context
length and pays only for the context there is.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

CHUNK = 128  # keys a step of the loop over the context
TILE = 64  # queries of one sequence that are worked on together
MASK_BITS = 32  # of a draft mask: the keys that one may hide are fewer places away


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    layer: Array,
    block_tables: Array,
    query_start_loc: Array,
    seq_lens: Array,
    draft_mask: Array | None,
    *,
    max_query_len: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Array:
    """See `op.paged_attention`."""
    T, H, D = q.shape
    KV, block_size = k_cache.shape[2:4]
    blocks_per_chunk = max(1, CHUNK // block_size)
    chunk = blocks_per_chunk * block_size
    padding = -block_tables.shape[1] % blocks_per_chunk
    block_tables = jnp.pad(block_tables, ((0, 0), (0, padding)))

    def attend(
        q: Array, tables: Array, positions: Array, mask: Array | None, first: Array, last: Array
    ) -> Array:
        """Attend `q [N, Q, KV, G, D]` at `positions [N, Q]` to the chunks `first..last-1`."""
        q = jnp.moveaxis(q, 1, 3)  # [N, KV, G, Q, D]
        N, _, G, Q, _ = q.shape
        q = q.reshape(N, KV, G * Q, D)
        query_position = jnp.tile(positions, (1, G))[:, None, :, None]  # [N, 1, G*Q, 1]
        if mask is not None:
            mask = jnp.tile(mask, (1, G))[:, None, :, None]

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc, row_max, row_sum = carry
            ids = lax.dynamic_slice_in_dim(tables, i * blocks_per_chunk, blocks_per_chunk, 1)
            k = jnp.swapaxes(k_cache[layer, ids], 1, 2).reshape(N, KV, chunk, D)
            v = jnp.swapaxes(v_cache[layer, ids], 1, 2).reshape(N, KV, chunk, D)
            scores = _dot(q, k, ((3,), (3,))) * scale  # [N, KV, G*Q, chunk]
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            key_position = (i * chunk + jnp.arange(chunk))[None, None, None, :]
            visible = key_position <= query_position
            if mask is not None:
                visible &= sees(mask, query_position - key_position)
            if sliding_window is not None:
                begin = query_position - sliding_window
                visible &= key_position > (begin if mask is None else begin - num_hidden(mask))
            scores = jnp.where(visible, scores, -jnp.inf)
            new_max = jnp.maximum(row_max, scores.max(-1))
            # A row that has seen no key yet has the maximum -inf; 0 keeps its exponentials at 0.
            base = jnp.where(new_max == -jnp.inf, 0.0, new_max)
            weights = jnp.exp(scores - base[..., None])
            decay = jnp.exp(row_max - base)
            acc = acc * decay[..., None] + _dot(weights.astype(v.dtype), v, ((3,), (2,)))
            return acc, new_max, row_sum * decay + weights.sum(-1)

        init = (
            jnp.zeros((N, KV, G * Q, D), jnp.float32),
            jnp.full((N, KV, G * Q), -jnp.inf, jnp.float32),
            jnp.zeros((N, KV, G * Q), jnp.float32),
        )
        acc, _, row_sum = lax.fori_loop(first, last, step, init)
        out = acc / jnp.maximum(row_sum, 1e-30)[..., None]
        return jnp.moveaxis(out.reshape(N, KV, G, Q, D), 3, 1)  # [N, Q, KV, G, D]

    most_hidden = 0 if draft_mask is None else MASK_BITS - 1

    def chunk_range(lowest: Array, length: Array) -> tuple[Array, Array]:
        """Return the chunks that queries from position `lowest` of `length` keys can see."""
        first = (
            0 if sliding_window is None else (lowest - most_hidden - sliding_window + 1) // chunk
        )
        return jnp.maximum(first, 0), -(-length // chunk)

    grouped = q.reshape(T, KV, H // KV, D)
    if max_query_len == 1:
        positions = seq_lens - 1
        lowest = jnp.where(seq_lens > 0, positions, jnp.iinfo(jnp.int32).max).min()
        first, last = chunk_range(lowest, seq_lens.max())
        mask = None if draft_mask is None else draft_mask[:, None]
        out = attend(grouped[:, None], block_tables, positions[:, None], mask, first, last)
        return out.reshape(T, H, D).astype(q.dtype)

    tile = min(TILE, max_query_len)
    query_lens = jnp.diff(query_start_loc)
    tiles = -(-query_lens // tile)
    tiles_end = jnp.cumsum(tiles)
    grouped = jnp.pad(grouped, ((0, tile), (0, 0), (0, 0), (0, 0)))
    masks = None if draft_mask is None else jnp.pad(draft_mask, (0, tile), constant_values=-1)

    def attend_tile(i: Array, out: Array) -> Array:
        s = jnp.searchsorted(tiles_end, i, side="right")
        offset = (i - tiles_end[s] + tiles[s]) * tile
        row = query_start_loc[s] + offset
        q_tile = lax.dynamic_slice_in_dim(grouped, row, tile)
        start = seq_lens[s] - query_lens[s] + offset
        first, last = chunk_range(start, jnp.minimum(start + tile, seq_lens[s]))
        table = lax.dynamic_slice_in_dim(block_tables, s, 1)
        positions = start + jnp.arange(tile)
        mask = None if masks is None else lax.dynamic_slice_in_dim(masks, row, tile)[None]
        result = attend(q_tile[None], table, positions[None], mask, first, last)[0]
        # The tile may reach past its sequence; those rows belong to the next one.
        mine = (offset + jnp.arange(tile) < query_lens[s])[:, None, None, None]
        old = lax.dynamic_slice_in_dim(out, row, tile)
        result = jnp.where(mine, result.astype(q.dtype), old)
        return lax.dynamic_update_slice_in_dim(out, result, row, 0)

    out = lax.fori_loop(0, tiles_end[-1], attend_tile, jnp.zeros_like(grouped))
    return out[:T].reshape(T, H, D)


def sees(mask: Array, distance: Array) -> Array:
    """Return whether queries with these masks see the keys `distance` places before them."""
    return ((mask >> jnp.clip(distance, 0, MASK_BITS - 1)) & 1) > 0


def num_hidden(mask: Array) -> Array:
    """Return how many keys each mask hides."""
    return lax.population_count(~mask)


def _dot(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """Product over `contract`, batched over the two leading axes, in float32."""
    dimensions = (contract, ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
