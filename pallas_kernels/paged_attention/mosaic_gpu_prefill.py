"""Paged attention for prompt chunks on Hopper, alone or beside decode rows in one batch.

Called by `op.paged_attention`. A thread block takes one head and one tile of 128 rows of the flat
query array, for one of the sequences that have rows there: one warpgroup brings the blocks of keys
and values in by TMA, two multiply, 64 rows each, so that one has the tensor cores while the other
computes exponentials. Sequences with a single query go to the decode kernel.
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
        take_turns: the compute warpgroups alternate between tensor cores and exponentials.
    """

    tile: int
    stages: int
    take_turns: bool = True

    def __post_init__(self):
        if self.tile not in (64, 128):
            raise ValueError(f"{self.tile=} must be 64 or 128")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")


def choose_config(D: int) -> Config:
    """Return the sizes for a head_dim; all of them fill the shared memory of a multiprocessor."""
    return {64: Config(128, 4), 128: Config(128, 2), 256: Config(64, 2)}[D]


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
    query_lens = jnp.diff(query_start_loc)

    # The tiles of the flat query array that each chunk touches, the later (longer) ones first.
    is_chunk = query_lens > 1
    first_tile = query_start_loc[:-1] // TILE
    tiles = jnp.where(is_chunk, (query_start_loc[1:] - 1) // TILE - first_tile + 1, 0)
    ends = jnp.cumsum(tiles)
    item = jnp.arange(-(-T // TILE) + min(S, T // 2))
    owner = jnp.searchsorted(ends, item, side="right")
    sequence = jnp.minimum(owner, S - 1).astype(jnp.int32)
    tile = (first_tile + ends - 1)[sequence] - item
    work = jnp.stack([sequence, tile.astype(jnp.int32)])
    # Many sequences can have one tile too many each, few do: a thread block without work takes
    # 0.8 us of a multiprocessor, so there are few, and they take turns if they must.
    workers = min(len(item), -(-T // TILE) + 8)

    masks = []
    if draft_mask is not None:
        padded = jnp.pad(draft_mask, (0, -T % TILE), constant_values=-1)
        masks = [jnp.stack([padded, num_hidden(padded)])]

    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    cache_tiles = plgpu.SMEM((config.stages, config.tile, D), q.dtype, transforms=swizzled)
    copies = config.tile // block_size if config.tile > block_size else 1
    scratch = {
        "q_smem": plgpu.RefUnion(
            plgpu.SMEM((2, ROWS, D), q.dtype, transforms=swizzled),
            plgpu.SMEM((2, ROWS, D), q.dtype),  # the result leaves where the queries were
        ),
        "k_smem": cache_tiles,
        "v_smem": cache_tiles,
        # The interpreter knows no wgmma with an operand in registers.
        "p_smem": plgpu.SMEM((2, ROWS, config.tile), q.dtype, transforms=swizzled)
        if interpret
        else None,
        "q_barriers": plgpu.Barrier(num_barriers=2),
        "k_barriers": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        "v_barriers": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
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
        grid=(H, workers),
        grid_names=("head", "worker"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="paged_attention_prefill",
    )(
        jnp.pad(q, ((0, -T % 8), (0, 0), (0, 0))),
        *all_blocks(k_cache, v_cache, layer),
        block_tables,
        query_start_loc,
        seq_lens,
        work,
        ends[-1:].astype(jnp.int32),
        *masks,
    )
    if S == 1:
        return out
    single = mosaic_gpu.decode(
        q[jnp.minimum(query_start_loc[:-1], T - 1)],
        k_cache,
        v_cache,
        layer,
        block_tables,
        jnp.arange(S + 1, dtype=jnp.int32),
        jnp.where(query_lens == 1, seq_lens, 0),
        None if draft_mask is None else draft_mask[jnp.minimum(query_start_loc[:-1], T - 1)],
        max_query_len=1,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        interpret=interpret,
    )
    return out.at[jnp.where(query_lens == 1, query_start_loc[:-1], T)].set(single, mode="drop")


class _Item(NamedTuple):
    """One tile of 128 rows of the flat query array, as far as one sequence has them.

    Attributes:
        sequence: whose rows.
        length: its tokens in the cache.
        top: first row of the tile.
        low, high: rows of the sequence in it.
        shift: position of a row in its sequence, less its index in the query array.
        begin, end: steps over the keys that any row sees.
        full_begin, full_end: those whose keys all rows see.
    """

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


def _item(
    index, starts_gmem, lens_gmem, work_gmem, tile: int, window: int | None, most_hidden: int
) -> _Item:
    sequence, top = work_gmem[0, index], work_gmem[1, index] * TILE
    length = lens_gmem[sequence]
    start, stop = starts_gmem[sequence], starts_gmem[sequence + 1]
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
    return _Item(sequence, length, top, low, high, shift, begin, full_begin, full_end, end)


def _body(
    q_gmem,  # [T rounded up to 8, H, D]
    k_gmem,  # [layers * blocks, KV, block_size, D]
    v_gmem,  # [layers * blocks, KV, block_size, D]
    first_gmem,  # [1], the layer's first block
    tables_gmem,  # [S, B]
    starts_gmem,  # [S + 1]
    lens_gmem,  # [S]
    work_gmem,  # [2, items]: sequence and tile of each item
    count_gmem,  # [1], of the items
    *more_gmem,  # [2, T rounded up to 128]: masks and how many keys they hide, if there are draft
    # masks; then the result, [T, H, D]
    is_masked: bool,
    config: Config,
    group: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    q_smem,
    k_smem,
    v_smem,
    p_smem,
    q_barriers,
    k_barriers,
    v_barriers,
    k_read,
    v_read,
    clean,
    turn,
):
    masks_gmem, (out_gmem,) = more_gmem[:is_masked], more_gmem[is_masked:]
    q_smem, out_smem = q_smem
    D, block_size, dtype = q_gmem.shape[2], k_gmem.shape[2], k_gmem.dtype
    tile, stages = config.tile, config.stages
    head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    interpreted = p_smem is not None
    most_hidden = (MASK_BITS - 1) * is_masked

    def each_item(run):
        """Run the items of this thread block; after each the barriers are as they were."""

        @pl.loop(lax.axis_index("worker"), count_gmem[0], step=lax.axis_size("worker"))
        def _(index):
            item = _item(
                index, starts_gmem, lens_gmem, work_gmem, tile, sliding_window, most_hidden
            )
            run(item)

    def load(item: _Item):
        first_block, steps = first_gmem[0], item.end - item.begin
        last_block = lax.div(item.length + (block_size - 1), block_size) - 1

        def fetch(i, slot, cache_gmem, tile_smem, barriers):
            for j in range(tile // block_size):
                index = jnp.minimum((item.begin + i) * (tile // block_size) + j, last_block)
                plgpu.copy_gmem_to_smem(
                    cache_gmem.at[
                        first_block + tables_gmem[item.sequence, index], lax.div(head, group)
                    ],
                    tile_smem.at[slot, pl.ds(j * block_size, block_size)],
                    barriers.at[slot],
                )

        @pl.loop(0, steps)
        def _(i):
            slot = lax.rem(i, jnp.int32(stages))
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(k_read.at[slot]))
            fetch(i, slot, k_gmem, k_smem, k_barriers)
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(v_read.at[slot]))
            fetch(i, slot, v_gmem, v_smem, v_barriers)

        # Every arrival is waited for, or the barriers would be left in the wrong phase.
        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(i):
            slot = lax.rem(i, jnp.int32(stages))
            plgpu.barrier_wait(k_read.at[slot])
            plgpu.barrier_wait(v_read.at[slot])

    def pass_turn():
        if config.take_turns:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def attend(item: _Item):
        first_row = item.top + warpgroup * ROWS
        plgpu.copy_gmem_to_smem(
            q_gmem.at[pl.ds(pl.multiple_of(first_row, 8), ROWS), head],
            q_smem.at[warpgroup],
            q_barriers.at[warpgroup],
        )
        by_row = plgpu.Layout.WGMMA.reduce(1)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
        row_max = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row)
        row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
        mask = hidden = None
        if is_masked:
            mask, hidden = load_masks(masks_gmem[0], pl.ds(first_row, ROWS), sliding_window)
        plgpu.barrier_wait(q_barriers.at[warpgroup])
        pl.when(warpgroup == 1)(pass_turn)

        def step(i, carry, *, masked: bool):
            acc, row_max, row_sum = carry
            slot = lax.rem(i - item.begin, jnp.int32(stages))
            plgpu.barrier_wait(k_barriers.at[slot])

            def qk(scores):
                plgpu.wgmma(scores, q_smem.at[warpgroup], k_smem.at[slot].transpose((1, 0)))
                pass_turn()
                return scores[...]

            scores = pl.run_scoped(qk, plgpu.ACC((ROWS, tile), jnp.float32))
            plgpu.barrier_arrive(k_read.at[slot])
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

            if config.take_turns:
                plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_barriers.at[slot])
            if config.take_turns:
                plgpu.barrier_wait(turn)
            if masked:

                @pl.when((i + 1) * tile > item.length)
                def _():
                    # What lies past the end may be NaN, which a weight of 0 does not silence.
                    @pl.when(warpgroup == 0)
                    def _():
                        values = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA)
                        index = plgpu.broadcasted_iota(
                            jnp.int32, (tile, D), 0, layout=plgpu.Layout.WGMMA
                        )
                        inside = index < item.length - i * tile
                        v_smem[slot] = jnp.where(inside, values, jnp.zeros_like(values))
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
        pl.when(warpgroup == 0)(pass_turn)

        inverse = 1 / jnp.maximum(row_sum, 1e-30)
        acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        out_smem[warpgroup] = acc.astype(dtype)
        plgpu.commit_smem()
        begin_row = jnp.maximum(item.low, first_row)
        count = jnp.minimum(item.high, first_row + ROWS) - begin_row

        def store(row, rows):
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup, pl.ds(row - first_row, rows)],
                out_gmem.at[pl.ds(row, rows), head],
            )

        # Any number of rows as a sum of powers of two, TMA boxes being static.
        for bit in range(ROWS.bit_length()):
            rows = 1 << bit
            below = count & (rows - 1)
            pl.when((count > 0) & ((count & rows) != 0))(
                functools.partial(store, begin_row + below, rows)
            )
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == PRODUCER)
    def _():
        if not interpreted:
            plgpu.set_max_registers(40, action="decrease")
        each_item(load)

    @pl.when(warpgroup < PRODUCER)
    def _():
        if not interpreted:
            plgpu.set_max_registers(232, action="increase")
        each_item(attend)
