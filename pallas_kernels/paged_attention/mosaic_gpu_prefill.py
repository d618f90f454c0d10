"""Paged attention for prompt chunks on Hopper, alone or beside decode rows in one batch.

Called by `op.paged_attention`. An item of work is one head and one tile of 128 rows of the flat
query array, for one of the sequences that have rows there. There is a thread block for each
multiprocessor, which takes item after item: one warpgroup brings queries and the blocks of keys and
values in by TMA, those of the next item while the last one is being finished; two multiply, 64 rows
each, so that one has the tensor cores while the other computes exponentials. Sequences with a
single query go to the decode kernel.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels.paged_attention import mosaic_gpu
from arctic_jax.pallas_kernels.paged_attention.mosaic_gpu import (
    load_masks,
    visible_keys,
)
from arctic_jax.pallas_kernels.paged_attention.reference import MASK_BITS, num_hidden
from arctic_jax.pallas_kernels.paged_cache import all_blocks

ROWS = 64  # of one compute warpgroup
TILE = 2 * ROWS  # query rows of a thread block
PRODUCER = 2  # index of the warpgroup that loads
LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that a row without any key yields a number


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the prefill kernel.

    Attributes:
        tile: keys a step.
        stages: steps whose keys and values are in shared memory or on their way.
        shares: whether a result leaves through the memory of its queries, so that those of the next
            item have to wait for it.
        take_turns: the compute warpgroups alternate between tensor cores and exponentials.
    """

    tile: int
    stages: int
    shares: bool
    take_turns: bool = True

    def __post_init__(self):
        if self.tile not in (64, 128):
            raise ValueError(f"{self.tile=} must be 64 or 128")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")


def choose_config(D: int) -> Config:
    """Return the sizes for a head_dim; all of them fill the shared memory of a multiprocessor."""
    return {64: Config(128, 4, False), 128: Config(128, 2, False), 256: Config(64, 2, True)}[D]


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
def mixed(
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
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.paged_attention`."""
    T, H, D = q.shape
    S = len(seq_lens)
    KV, block_size = k_cache.shape[2:4]
    config = config or choose_config(D)
    work, count = _tiles(T, query_start_loc, seq_lens, sliding_window)
    # In the interpreter few, so that they have several items there, too.
    blocks = min(mosaic_gpu.SMS if interpret is None else 3, H * work.shape[1])

    masks = []
    if draft_mask is not None:
        padded = jnp.pad(draft_mask, (0, -T % TILE), constant_values=-1)
        masks = [jnp.stack([padded, num_hidden(padded)])]

    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    queries = plgpu.SMEM((2, ROWS, D), q.dtype, transforms=swizzled)
    result = plgpu.SMEM((2, ROWS, D), q.dtype)
    cache_tiles = plgpu.SMEM((config.stages, config.tile, D), q.dtype, transforms=swizzled)
    copies = config.tile // block_size if config.tile > block_size else 1
    scratch = {
        "q_and_out_smem": plgpu.RefUnion(queries, result) if config.shares else (queries, result),
        "k_smem": cache_tiles,
        "v_smem": cache_tiles,
        # The interpreter knows no wgmma with an operand in registers.
        "p_smem": plgpu.SMEM((2, ROWS, config.tile), q.dtype, transforms=swizzled)
        if interpret
        else None,
        "q_barrier": plgpu.Barrier(num_arrivals=2),
        "k_barriers": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        "v_barriers": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        "q_read": plgpu.Barrier(num_arrivals=2),
        "k_read": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        "v_read": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        "clean": plgpu.Barrier(),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    body = functools.partial(
        _body,
        is_masked=draft_mask is not None,
        config=config,
        group=H // KV,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, H, D), q.dtype),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="paged_attention_prefill",
    )(
        jnp.pad(q, ((0, -T % 8), (0, 0), (0, 0))),
        *all_blocks(k_cache, v_cache, layer),
        block_tables,
        work,
        count,
        *masks,
    )
    if S == 1:
        return out
    return mosaic_gpu.decode(
        q,
        k_cache,
        v_cache,
        layer,
        block_tables,
        query_start_loc,
        jnp.where(jnp.diff(query_start_loc) == 1, seq_lens, 0),
        draft_mask,
        max_query_len=1,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        into=out,
        interpret=interpret,
    )


def _tiles(
    T: int, query_start_loc: Array, seq_lens: Array, window: int | None
) -> tuple[Array, Array]:
    """Return the tiles of the flat query array that each chunk touches, and `[1]` how many.

    `[5, tiles]`: the sequence and the tile's first row; the sequence's first row, the row after its
    last, and its tokens in the cache. Tiles that see the most keys come first.
    """
    S = len(seq_lens)
    starts, stops = query_start_loc[:-1], query_start_loc[1:]
    first_tile = starts // TILE
    tiles = jnp.where(stops - starts > 1, (stops - 1) // TILE - first_tile + 1, 0)
    ends = jnp.cumsum(tiles)
    item = jnp.arange(-(-T // TILE) + min(S, T // 2))
    owner = jnp.searchsorted(ends, item, side="right", method="compare_all")  # without a loop
    sequence = jnp.minimum(owner, S - 1)
    start, stop, length = jnp.stack([starts, stops, seq_lens])[:, sequence]
    top = TILE * (first_tile + tiles - ends)[sequence] + TILE * item
    seen = length - stop + jnp.minimum(top + TILE, stop)
    if window is not None:
        seen = jnp.minimum(seen, window + TILE)
    longest = jnp.argsort(jnp.where(item < ends[-1], -seen, 1))
    work = jnp.stack([sequence, top, start, stop, length])[:, longest]
    return work.astype(jnp.int32), ends[-1:].astype(jnp.int32)


class _Item(NamedTuple):
    """One head, and one tile of 128 rows of the flat query array, as far as one sequence has them.

    Attributes:
        head: of the queries.
        sequence: whose rows.
        length: its tokens in the cache.
        top: first row of the tile.
        low, high: rows of the sequence in it.
        shift: position of a row in its sequence, less its index in the query array.
        begin, end: steps over the keys that any row sees.
        full_begin, full_end: those whose keys all rows see.
    """

    head: Array
    sequence: Array
    length: Array
    top: Array
    low: Array
    high: Array
    shift: Array
    begin: Array | int
    full_begin: Array | int
    full_end: Array
    end: Array


def _item(head, work, tile: int, window: int | None, most_hidden: int) -> _Item:
    sequence, top, start, stop, length = work
    low, high = jnp.maximum(start, top), jnp.minimum(stop, top + TILE)
    shift = length - stop
    end = lax.div(high + shift + (tile - 1), tile)
    full_end = lax.div(low + shift + 1, tile)
    if most_hidden:  # a key that is not before all rows, or close before them, may be hidden
        full_end = lax.div(jnp.maximum(low + shift + 1 - most_hidden, 0), tile)
    begin = full_begin = 0
    if window is not None:
        begin = lax.div(jnp.maximum(low + shift - (window - 1 + most_hidden), 0), tile)
        seen_by_all = jnp.maximum(high - 1 + shift - (window - 1), 0)
        full_begin = jnp.minimum(lax.div(seen_by_all + (tile - 1), tile), end)
        full_end = jnp.maximum(full_end, full_begin)
    rows = top, low, high
    return _Item(head, sequence, length, *rows, shift, begin, full_begin, full_end, end)


def _body(
    q_gmem,  # [T rounded up to 8, H, D]
    k_gmem,  # [layers * blocks, KV, block_size, D]
    v_gmem,  # [layers * blocks, KV, block_size, D]
    first_gmem,  # [1], the layer's first block
    tables_gmem,  # [S, B]
    work_gmem,  # [5, tiles], see `_tiles`
    count_gmem,  # [1], of the tiles
    *more_gmem,  # [2, T rounded up to 128]: masks and how many keys they hide, if there are draft
    # masks; then the result, [T, H, D]
    is_masked: bool,
    config: Config,
    group: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    q_and_out_smem,
    k_smem,
    v_smem,
    p_smem,
    q_barrier,
    k_barriers,
    v_barriers,
    q_read,
    k_read,
    v_read,
    clean,
    turn,
):
    masks_gmem, (out_gmem,) = more_gmem[:is_masked], more_gmem[is_masked:]
    q_smem, out_smem = q_and_out_smem
    _, heads, D = q_gmem.shape
    block_size, dtype = k_gmem.shape[2], k_gmem.dtype
    tile, stages = config.tile, config.stages
    warpgroup = lax.axis_index("warpgroup")
    interpreted = p_smem is not None
    most_hidden = (MASK_BITS - 1) * is_masked

    def each_item(run):
        """Run the items of this thread block: every n-th, from either end of n in turns.

        Long ones come first, so that all thread blocks get about as much. `run` gets an item, how
        many were before it, and their steps. How many there were in the end is returned.
        """
        block, blocks = lax.axis_index("block"), lax.axis_size("block")
        count = count_gmem[0] * heads

        def index(turn):
            return turn * blocks + jnp.where(lax.rem(turn, 2) == 0, block, blocks - 1 - block)

        def look_up(turn):
            row = lax.div(jnp.clip(index(turn), 0, jnp.maximum(count - 1, 0)), heads)
            return tuple(work_gmem[i, row] for i in range(5))

        def run_one(turn, carry):
            before, work = carry
            following = look_up(turn + 1)  # now, and not when it is waited for
            item = _item(lax.rem(index(turn), heads), work, tile, sliding_window, most_hidden)
            run(item, turn, before)
            return before + item.end - item.begin, following

        turns = lax.div(count, blocks)
        turns += (index(turns) < count).astype(jnp.int32)
        steps, _ = lax.fori_loop(0, turns, run_one, (jnp.int32(0), look_up(0)))
        return turns, steps

    def load(item: _Item, items_before, steps_before):
        first_block = first_gmem[0]
        last_block = lax.div(item.length + (block_size - 1), block_size) - 1

        def fetch_queries():
            pl.when(items_before > 0)(lambda: plgpu.barrier_wait(q_read))
            for i in range(2):
                plgpu.copy_gmem_to_smem(
                    q_gmem.at[pl.ds(pl.multiple_of(item.top + i * ROWS, 8), ROWS), item.head],
                    q_smem.at[i],
                    q_barrier,
                )

        def fetch(i, slot, cache_gmem, tile_smem, barriers):
            for j in range(tile // block_size):
                index = jnp.minimum(i * (tile // block_size) + j, last_block)
                plgpu.copy_gmem_to_smem(
                    cache_gmem.at[
                        first_block + tables_gmem[item.sequence, index], lax.div(item.head, group)
                    ],
                    tile_smem.at[slot, pl.ds(j * block_size, block_size)],
                    barriers.at[slot],
                )

        @pl.loop(item.begin, item.end)
        def _(i):
            step = steps_before + i - item.begin
            slot = lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_read.at[slot]))
            fetch(i, slot, k_gmem, k_smem, k_barriers)
            pl.when(i == item.begin)(fetch_queries)  # these wait longer, for the item before
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_read.at[slot]))
            fetch(i, slot, v_gmem, v_smem, v_barriers)

    def end_turn():
        if config.take_turns:
            plgpu.barrier_arrive(turn)

    def wait_for_turn():
        if config.take_turns:
            plgpu.barrier_wait(turn)

    def pass_turn():
        end_turn()
        wait_for_turn()

    def attend(item: _Item, _, steps_before):
        first_row = item.top + warpgroup * ROWS
        by_row = plgpu.Layout.WGMMA.reduce(1)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
        row_max = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row)
        row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
        mask = hidden = None
        if is_masked:
            mask, hidden = load_masks(masks_gmem[0], pl.ds(first_row, ROWS), sliding_window)
        plgpu.barrier_wait(q_barrier)
        pl.when(warpgroup == 1)(wait_for_turn)

        def step(i, carry, *, masked: bool):
            acc, row_max, row_sum = carry
            slot = lax.rem(steps_before + i - item.begin, stages)
            plgpu.barrier_wait(k_barriers.at[slot])

            def qk(scores):
                plgpu.wgmma(scores, q_smem.at[warpgroup], k_smem.at[slot].transpose((1, 0)))
                pass_turn()
                return scores[...]

            scores = pl.run_scoped(qk, plgpu.ACC((ROWS, tile), jnp.float32))
            plgpu.barrier_arrive(k_read.at[slot])
            if not config.shares:
                pl.when(i + 1 == item.end)(lambda: plgpu.barrier_arrive(q_read))
            factor = scale * LOG2E
            if soft_cap is not None:
                scores = jnp.tanh(scores * (scale / soft_cap))
                factor = soft_cap * LOG2E
            if masked:
                iota = functools.partial(
                    plgpu.broadcasted_iota, jnp.int32, layout=plgpu.Layout.WGMMA
                )
                ahead = iota((ROWS, tile), 1) - iota((ROWS, tile), 0)
                ahead = ahead + (i * tile - first_row - item.shift)  # key less query position
                if mask is not None:
                    visible = visible_keys(-ahead, mask, hidden, sliding_window)
                else:
                    visible = ahead <= 0
                    if sliding_window is not None:
                        visible &= ahead > -sliding_window
                # Scaled first: a fused multiply-add of MASKED would leave its rounding error.
                scores = jnp.where(visible, scores * factor, MASKED)
                factor = 1.0
            # The scale is applied in the exponent's multiply-add.
            new_max = jnp.maximum(row_max, scores.max(axis=1) * factor)
            decay = jnp.exp2(row_max - new_max)
            weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_max, scores.shape, [0]))
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
            row_sum = row_sum * decay + weights.sum(axis=1)
            weights = weights.astype(dtype)
            if not interpreted:
                acc, row_sum, new_max, weights = lax.optimization_barrier(
                    (acc, row_sum, new_max, weights)
                )

            end_turn()
            plgpu.barrier_wait(v_barriers.at[slot])
            wait_for_turn()
            if masked:

                @pl.when((i + 1) * tile > item.length)
                def _():
                    # What lies past the end may be NaN, which a weight of 0 does not silence.
                    @pl.when(warpgroup == 0)
                    def _():
                        for first in range(0, tile, ROWS):  # so that few registers suffice
                            part = v_smem.at[slot, pl.ds(first, ROWS)]
                            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                            index = plgpu.broadcasted_iota(
                                jnp.int32, (ROWS, D), 0, layout=plgpu.Layout.WGMMA
                            )
                            inside = index < item.length - i * tile - first
                            part[...] = jnp.where(inside, values, jnp.zeros_like(values))
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(clean)

                    pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(clean))

            if interpreted:
                p_smem[warpgroup] = weights
                plgpu.commit_smem()

            def pv(product):
                left = p_smem.at[warpgroup] if interpreted else weights
                plgpu.wgmma(product, left, v_smem.at[slot])
                if interpreted:
                    return product[...]

            if interpreted:
                acc = acc + pl.run_scoped(pv, plgpu.ACC((ROWS, D), jnp.float32))
            else:
                acc = pl.run_state(pv)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_read.at[slot])
            return acc, new_max, row_sum

        carry = acc, row_max, row_sum
        edge, inner = (functools.partial(step, masked=masked) for masked in (True, False))
        if sliding_window is not None:
            carry = lax.fori_loop(item.begin, item.full_begin, edge, carry)
        carry = lax.fori_loop(item.full_begin, item.full_end, inner, carry)
        acc, row_max, row_sum = lax.fori_loop(item.full_end, item.end, edge, carry)
        # The second's last product needs not wait until the first has stored its result, nor the
        # first's next one until the second has.
        pl.when(warpgroup == 0)(pass_turn)
        pl.when(warpgroup == 1)(end_turn)

        inverse = 1 / jnp.maximum(row_sum, 1e-30)
        acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
        out_smem[warpgroup] = acc.astype(dtype)
        plgpu.commit_smem()
        begin_row = jnp.maximum(item.low, first_row)
        count = jnp.minimum(item.high, first_row + ROWS) - begin_row

        def store(row, rows):
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup, pl.ds(row - first_row, rows)],
                out_gmem.at[pl.ds(row, rows), item.head],
            )

        # Any number of rows as a sum of powers of two, TMA boxes being static.
        for bit in range(ROWS.bit_length()):
            rows = 1 << bit
            below = count & (rows - 1)
            pl.when((count > 0) & ((count & rows) != 0))(
                functools.partial(store, begin_row + below, rows)
            )
        if config.shares:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_read)

    @pl.when(warpgroup == PRODUCER)
    def _():
        if not interpreted:
            plgpu.set_max_registers(24, action="decrease")
        items, steps = each_item(load)

        # The last arrivals are waited for, too: barriers are left as they were found.
        pl.when(items > 0)(lambda: plgpu.barrier_wait(q_read))

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(k_read.at[lax.rem(step, stages)])
            plgpu.barrier_wait(v_read.at[lax.rem(step, stages)])

    @pl.when(warpgroup < PRODUCER)
    def _():
        if not interpreted:
            plgpu.set_max_registers(240, action="increase")
        pl.when(warpgroup == 1)(end_turn)
        each_item(attend)
        pl.when(warpgroup == 0)(pass_turn)
        pl.when(warpgroup == 1)(wait_for_turn)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
