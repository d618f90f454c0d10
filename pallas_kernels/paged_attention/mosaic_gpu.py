"""Paged attention for few queries a sequence (decode, draft verification) on Hopper.

Called by `op.paged_attention`. One thread block works on one sequence, one key/value head and one
split of the context: it brings tiles of keys and values in by TMA, one copy a block of the cache,
and keeps a running softmax over them for the query rows of its head group. The rows are padded to
the 64 that a wgmma has; the tensor cores have time for that while the memory system is the limit.

Where a context is split, a second launch merges the results. Thread blocks that merge among
themselves would have to be one cluster, which was slower (it leaves multiprocessors idle), or count
their arrivals in memory that someone has to clear.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels.paged_attention.reference import MASK_BITS, num_hidden
from arctic_jax.pallas_kernels.paged_cache import all_blocks

ROWS = 64  # query rows of a thread block, the M of one wgmma
SMEM_BYTES = 227 * 1024  # what one thread block may have
SMS = 132
MAX_SPLITS = 64  # the merge of a row keeps them all in flight
LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that a row without any key yields 0 and not NaN


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the decode kernel.

    Attributes:
        tile: keys a step.
        stages: steps whose keys and values are in shared memory or on their way.
        splits: thread blocks that share the context of one sequence and head.
    """

    tile: int
    stages: int
    splits: int

    def __post_init__(self):
        if self.tile not in (64, 128, 256):
            raise ValueError(f"{self.tile=} must be 64, 128 or 256")
        if self.stages < 1:
            raise ValueError(f"{self.stages=} must be positive")
        if not 1 <= self.splits <= MAX_SPLITS:
            raise ValueError(f"{self.splits=} must be between 1 and {MAX_SPLITS}")


def choose_config(S: int, KV: int, D: int, blocks_per_sequence: int, block_size: int) -> Config:
    """Return the sizes for a batch of `S` sequences, from static shapes alone.

    What measured best on an H200: few stages, so that two thread blocks fit on a multiprocessor and
    hide each other's latencies. A context is split until every multiprocessor has a thread block;
    and, for lengths that differ, where the block tables have room for long ones (each split costs a
    thread block even where it finds nothing to do).
    """
    items, keys = S * KV, blocks_per_sequence * block_size
    by_length = min(keys // (1024 if D == 64 else 1536), 2048 // items, 4)
    splits = min(max(round(SMS / items), by_length), keys // 128, MAX_SPLITS)
    return Config(64, 2, max(splits, 1))


def unsupported(q: jax.ShapeDtypeStruct, k_cache: jax.ShapeDtypeStruct) -> str | None:
    """Return why neither this kernel nor the prefill kernel takes the shapes, or `None`."""
    H, D = q.shape[1:]
    KV, block_size = k_cache.shape[2:4]
    if q.dtype != k_cache.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries are {q.dtype}, the cache is {k_cache.dtype}; both must be one 16-bit type"
    if D not in (64, 128, 256):
        return f"head_dim {D} is not 64, 128 or 256"
    if block_size not in (16, 32, 64):
        return f"block_size {block_size} is not 16, 32 or 64"
    if H // KV > ROWS:
        return f"{H // KV} query heads of one key/value head are more than {ROWS}"
    return None


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(
    jax.jit,
    static_argnames=(
        "max_query_len",
        "scale",
        "sliding_window",
        "soft_cap",
        "config",
        "interpret",
    ),
)
def decode(
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
    into: Array | None = None,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.paged_attention`; `max_query_len * H / KV` is at most 64.

    With `into [T, H, D]`, sequences have one query each, and its row is where `query_start_loc`
    says. Their results are written into that array, all other rows of which stay as they are.
    """
    T, H, D = q.shape
    S, B = block_tables.shape
    KV, block_size = k_cache.shape[2:4]
    G, Q = H // KV, max_query_len
    config = config or choose_config(S, KV, D, B, block_size)
    splits = config.splits

    # The query rows of a head group start at a multiple of 8 rows or lie within 8: TMA tiles.
    if Q == 1 and H % 8 == 0 and (G % 8 == 0 or 8 % G == 0):
        rows, stride = q, G
    else:
        stride = -(-Q * G // 8) * 8
        of_sequence = jnp.minimum(query_start_loc[:-1, None] + jnp.arange(Q), T - 1)
        rows = q if Q == 1 and into is None else q[of_sequence]
        rows = jnp.moveaxis(rows.reshape(S, Q, KV, G, D), 1, 2).reshape(S, KV, Q * G, D)
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, stride - Q * G), (0, 0)))
        rows = rows.reshape(S, KV * stride, D)
    masks = [] if draft_mask is None else [_row_masks(draft_mask, query_start_loc, Q, G)]

    out_type = jax.ShapeDtypeStruct((T, H, D), q.dtype)
    partial_type = [
        jax.ShapeDtypeStruct((S, KV, splits, Q * G, D), jnp.float32),
        jax.ShapeDtypeStruct((S, KV, splits, ROWS), jnp.float32),
    ]
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    copies = config.tile // block_size
    scratch = {
        "q_smem": plgpu.SMEM((ROWS, D), q.dtype, transforms=swizzled),
        "tiles_smem": plgpu.RefUnion(
            [
                plgpu.SMEM((config.stages, config.tile, D), q.dtype, transforms=swizzled),
                plgpu.SMEM((config.stages, config.tile, D), q.dtype, transforms=swizzled),
            ],
            # The result leaves through the memory of the tiles, when they have been read.
            plgpu.SMEM((ROWS, D), q.dtype if splits == 1 else jnp.float32),
        ),
        "lse_smem": plgpu.SMEM((ROWS,), jnp.float32),
        # The interpreter knows no wgmma with an operand in registers.
        "p_smem": plgpu.SMEM((ROWS, config.tile), q.dtype, transforms=swizzled)
        if interpret
        else None,
        "q_barrier": plgpu.Barrier(),
        "k_barriers": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        "v_barriers": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
    }
    body = functools.partial(
        _decode_body,
        is_masked=bool(masks),
        is_scattered=into is not None,
        is_gathered=into is None or rows is not q,
        config=config,
        group=G,
        queries=Q,
        row_stride=stride,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    launch = functools.partial(_launch, interpret=interpret)
    arguments = (
        rows,
        *all_blocks(k_cache, v_cache, layer),
        block_tables,
        query_start_loc,
        seq_lens,
        *masks,
    )
    grid = {"split": splits, "head": KV, "sequence": S}
    if splits == 1:
        return launch("decode", body, arguments, grid, into, [out_type], scratch)[0]
    partial = launch("decode", body, arguments, grid, None, partial_type, scratch)
    body = functools.partial(_merge_body, group=G, row_stride=stride, is_scattered=into is not None)
    grid = {"row": Q * G, "head": KV, "sequence": S}
    return launch("merge", body, (*partial, query_start_loc, seq_lens), grid, into, [out_type])[0]


def _launch(
    name: str,
    body: Callable[..., None],
    arguments: Sequence[Array],
    grid: dict[str, int],
    into: Array | None,
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: dict[str, Any] | None = None,
    *,
    interpret: plgpu.InterpretGPUParams | None,
) -> Sequence[Array]:
    """Run a kernel; return its results, or its one result `into`, which it has changed."""
    in_place = [] if into is None else [jax.new_ref(into)]

    def scoped(*refs):
        pl.run_scoped(functools.partial(body, *refs), **scratch or {})

    results: Any = pl.kernel(
        scoped,
        out_type=[] if in_place else out_type,
        mesh=plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or False,
        name=f"paged_attention_{name}",
    )(*arguments, *in_place)
    return [jax.freeze(ref) for ref in in_place] or results


def _row_layout(D: int):
    """Return how a row of D elements lies in a warpgroup's registers."""
    return plgpu.Layout.WG_STRIDED((D,), D // 128) if D >= 128 else plgpu.Layout.WGMMA.reduce(1)


def _clear_row(out_gmem, token, head):
    """Make the row of a token and a head in `out_gmem [T, H, D]` zero."""
    D = out_gmem.shape[2]
    zeros = jnp.zeros((D,), out_gmem.dtype)
    out_gmem[token, head] = plgpu.layout_cast(zeros, _row_layout(D))


def _row_masks(draft_mask: Array, query_start_loc: Array, queries: int, group: int) -> Array:
    """Return `[2, S, ROWS]` the mask of each query row, and how many keys it hides.

    Rows of a sequence lie where those of a head group do. Those are at the same places for every
    group, but where a sequence has one query only, whose mask all rows have.
    """
    query = jnp.minimum(jnp.arange(ROWS) // group, queries - 1)
    of_row = draft_mask[jnp.minimum(query_start_loc[:-1, None] + query, len(draft_mask) - 1)]
    return jnp.stack([of_row, num_hidden(of_row)])


def load_masks(masks_gmem, where, window):
    """Return the masks of 64 rows and, if there is a window, how many keys they hide."""
    by_row = plgpu.Layout.WGMMA.reduce(1)
    load = functools.partial(plgpu.load, layout=by_row, optimized=False)
    hidden = None if window is None else load(masks_gmem.at[1, where])
    return load(masks_gmem.at[0, where]), hidden


def visible_keys(distance, mask, hidden, window):
    """Return which keys the rows see, from how far those are before the rows' queries."""
    by_key = functools.partial(lax.broadcast_in_dim, shape=distance.shape, broadcast_dimensions=[0])
    bits = by_key(mask) >> jnp.clip(distance, 0, MASK_BITS - 1)
    visible = (distance >= 0) & ((bits & 1) > 0)
    return visible if window is None else visible & (distance - by_key(hidden) < window)


def _decode_body(
    q_gmem, k_gmem, v_gmem, first_gmem, tables_gmem, starts_gmem, lens_gmem, *more_gmem, **options
):
    """Attend, but for an empty slot: that takes a thread block 7 us, and returning less than 1."""
    out_gmem = more_gmem[options["is_masked"]]
    config, group, queries = (options[name] for name in ("config", "group", "queries"))
    has_row = queries == 1 and config.splits == 1 and not options["is_scattered"]
    sequence, head = lax.axis_index("sequence"), lax.axis_index("head")

    @pl.when(lens_gmem[sequence] > 0)
    def _():
        caches = (k_gmem, v_gmem, first_gmem, tables_gmem)
        _attend(q_gmem, *caches, starts_gmem, lens_gmem, *more_gmem, **options)

    if has_row:  # the slot has one all the same, to be finite

        @pl.when(lens_gmem[sequence] == 0)
        def _():
            for i in range(group):
                _clear_row(out_gmem, sequence, head * group + i)


def _attend(
    q_gmem,  # [S, rows, D] if they are gathered, else [T, rows, D]
    k_gmem,  # [layers * blocks, KV, block_size, D]
    v_gmem,  # [layers * blocks, KV, block_size, D]
    first_gmem,  # [1], the layer's first block
    tables_gmem,  # [S, B]
    starts_gmem,  # [S + 1]
    lens_gmem,  # [S]
    *more_gmem,  # [2, S, ROWS] of `_row_masks`, if there are draft masks; then the results:
    # [T, H, D], or [S, KV, splits, Q * G, D] if there are several splits, and beside that
    # [S, KV, splits, ROWS], the logarithms of their sums of exponentials
    is_masked: bool,
    is_scattered: bool,
    is_gathered: bool,
    config: Config,
    group: int,
    queries: int,
    row_stride: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    q_smem,
    tiles_smem,
    lse_smem,
    p_smem,
    q_barrier,
    k_barriers,
    v_barriers,
):
    masks_gmem, (out_gmem, *lse_gmem) = more_gmem[:is_masked], more_gmem[is_masked:]
    (k_smem, v_smem), out_smem = tiles_smem
    D, block_size, _B = q_gmem.shape[2], k_gmem.shape[2], tables_gmem.shape[1]
    tile, stages = config.tile, config.stages
    dtype = q_smem.dtype
    split, head = lax.axis_index("split"), lax.axis_index("head")
    sequence = lax.axis_index("sequence")

    # Rows are loaded from the multiple of 8 below the first one of this head group.
    first_row = head * row_stride
    offset = lax.rem(first_row, 8)
    loaded = -(-queries * group // 8) * 8
    start, query_len = _queries(sequence, starts_gmem, queries, is_scattered)
    plgpu.copy_gmem_to_smem(
        q_gmem.at[
            sequence if is_gathered else start,
            pl.ds(pl.multiple_of(first_row - offset, 8), loaded),
        ],
        q_smem.at[pl.ds(0, loaded)],
        q_barrier,
    )

    first_block, length = first_gmem[0], lens_gmem[sequence]
    last_tile = lax.div(length + (tile - 1), tile)
    first_tile = 0
    if sliding_window is not None:
        lowest = length - query_len - (sliding_window - 1)
        if is_masked:
            lowest -= MASK_BITS - 1
        first_tile = lax.div(jnp.maximum(lowest, 0), tile)
    share = lax.div(last_tile - first_tile + (config.splits - 1), config.splits)
    begin = first_tile + split * share
    steps = jnp.clip(last_tile - begin, 0, share)
    last_block = jnp.maximum(lax.div(length + (block_size - 1), block_size) - 1, 0)

    def fetch(step, slot, cache_gmem, tile_smem, barriers):
        """Start the copies of one tile; past the end its last block comes again, for nothing."""
        for i in range(tile // block_size):
            index = jnp.minimum((begin + step) * (tile // block_size) + i, last_block)
            plgpu.copy_gmem_to_smem(
                cache_gmem.at[first_block + tables_gmem[sequence, index], head],
                tile_smem.at[slot, pl.ds(i * block_size, block_size)],
                barriers.at[slot],
            )

    for i in range(stages):

        @pl.when(i < steps)
        def _(i=i):
            fetch(i, i, k_gmem, k_smem, k_barriers)
            fetch(i, i, v_gmem, v_smem, v_barriers)

    by_row = plgpu.Layout.WGMMA.reduce(1)
    acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
    row_max = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row)
    row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
    mask = hidden = None
    if is_masked:
        mask, hidden = load_masks(masks_gmem[0], sequence, sliding_window)
    plgpu.barrier_wait(q_barrier)

    def step(i, carry):
        acc, row_max, row_sum = carry
        slot = lax.rem(i, jnp.int32(stages))
        key = (begin + i) * tile  # position of the tile's first key

        plgpu.barrier_wait(k_barriers.at[slot])

        def qk(scores):
            plgpu.wgmma(scores, q_smem, k_smem.at[slot].transpose((1, 0)))
            return scores[...]

        scores = pl.run_scoped(qk, plgpu.ACC((ROWS, tile), jnp.float32))

        @pl.when(i + stages < steps)
        def _():
            fetch(i + stages, slot, k_gmem, k_smem, k_barriers)

        if soft_cap is None:
            scores = scores * (scale * LOG2E)
        else:
            scores = jnp.tanh(scores * (scale / soft_cap)) * (soft_cap * LOG2E)
        position = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=plgpu.Layout.WGMMA) + (
            key - length
        )  # from the end of the sequence, negative
        if queries == 1 and mask is None:
            visible = position < 0
            if sliding_window is not None:
                visible &= position >= -sliding_window
        else:
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row) - offset
            query = lax.broadcast_in_dim(lax.div(row, group) - query_len, position.shape, [0])
            if mask is not None:
                visible = visible_keys(query - position, mask, hidden, sliding_window)
            else:
                visible = position <= query
                if sliding_window is not None:
                    visible &= position > query - sliding_window
        scores = jnp.where(visible, scores, MASKED)

        new_max = jnp.maximum(row_max, scores.max(axis=1))
        decay = jnp.exp2(row_max - new_max)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_max, scores.shape, [0]))
        row_sum = row_sum * decay + weights.sum(axis=1)
        weights = weights.astype(dtype)

        plgpu.barrier_wait(v_barriers.at[slot])

        @pl.when(key + tile > length)
        def _():
            # What lies past the end may be NaN, which a weight of 0 does not silence.
            values = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA)
            index = plgpu.broadcasted_iota(jnp.int32, (tile, D), 0, layout=plgpu.Layout.WGMMA)
            v_smem[slot] = jnp.where(index < length - key, values, jnp.zeros_like(values))
            plgpu.commit_smem()

        if p_smem is not None:
            p_smem[...] = weights
            plgpu.commit_smem()

        def pv(product):
            plgpu.wgmma(product, weights if p_smem is None else p_smem, v_smem.at[slot])
            return product[...]

        product = pl.run_scoped(pv, plgpu.ACC((ROWS, D), jnp.float32))
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0]) + product

        @pl.when(i + stages < steps)
        def _():
            fetch(i + stages, slot, v_gmem, v_smem, v_barriers)

        return acc, new_max, row_sum

    acc, row_max, row_sum = lax.fori_loop(0, steps, step, (acc, row_max, row_sum))

    row_sum = jnp.maximum(row_sum, 1e-30)
    acc = acc * lax.broadcast_in_dim(1 / row_sum, acc.shape, [0])
    out_smem[...] = acc.astype(out_smem.dtype)
    if not lse_gmem:
        plgpu.commit_smem()
        for i in range(queries):

            @pl.when(i < query_len)
            def _(i=i):
                plgpu.copy_smem_to_gmem(
                    out_smem.at[pl.ds(offset + i * group, group)],
                    out_gmem.at[start + i, pl.ds(head * group, group)],
                )

    else:
        lse_smem[...] = row_max + jnp.log2(row_sum)
        plgpu.commit_smem()
        mine = out_smem.at[pl.ds(offset, queries * group)]
        plgpu.copy_smem_to_gmem(mine, out_gmem.at[sequence, head, split])
        plgpu.copy_smem_to_gmem(lse_smem, lse_gmem[0].at[sequence, head, split])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _queries(sequence, starts_gmem, queries, is_scattered):
    """Return the first row and the number of a sequence's queries, of at most `queries`."""
    if queries == 1:
        return starts_gmem[sequence] if is_scattered else sequence, 1
    start = starts_gmem[sequence]
    return start, starts_gmem[sequence + 1] - start


def _merge_body(
    splits_gmem,  # [S, KV, splits, Q * G, D], each normalized by itself
    lse_gmem,  # [S, KV, splits, ROWS]
    starts_gmem,  # [S + 1]
    lens_gmem,  # [S]
    out_gmem,  # [T, H, D]
    *,
    group: int,
    row_stride: int,
    is_scattered: bool,
):
    splits, D = splits_gmem.shape[2], splits_gmem.shape[4]
    row, head = lax.axis_index("row"), lax.axis_index("head")
    sequence = lax.axis_index("sequence")
    queries = splits_gmem.shape[3] // group
    start, query_len = _queries(sequence, starts_gmem, queries, is_scattered)
    query, head_in_group = lax.div(row, group), lax.rem(row, group)

    @pl.when((query < query_len) & (lens_gmem[sequence] > 0))
    def _():
        # The weight of a split is its share of the sum of exponentials.
        offset = lax.rem(head * row_stride, 8)
        lse = [lse_gmem[sequence, head, split, offset + row] for split in range(splits)]
        largest = functools.reduce(jnp.maximum, lse)
        weights = [jnp.exp2(x - largest) for x in lse]
        total = functools.reduce(jnp.add, weights)
        load = functools.partial(plgpu.load, layout=_row_layout(D), optimized=False)
        results = [
            load(splits_gmem.at[sequence, head, split, row]) * (weight / total)
            for split, weight in enumerate(weights)
        ]
        merged = functools.reduce(jnp.add, results).astype(out_gmem.dtype)
        out_gmem[start + query, head * group + head_in_group] = merged

    if is_scattered:
        return

    @pl.when((query < query_len) & (lens_gmem[sequence] == 0))
    def _():
        _clear_row(out_gmem, start + query, head * group + head_in_group)
