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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels.paged_attention import mosaic_gpu
from arctic_jax.pallas_kernels.paged_attention.mosaic_gpu import load_masks, visible_keys
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


def _body(*references, is_masked: bool, q_and_out_smem, **options):
    """Run one thread block: its third warpgroup loads, the other two compute."""
    *inputs, out_gmem = references
    masks_gmem = inputs.pop() if is_masked else None
    q_smem, out_smem = q_and_out_smem
    shared = {"q_smem": q_smem, "out_smem": out_smem}
    warpgroup = lax.axis_index("warpgroup")
    block = _ThreadBlock(*inputs, masks_gmem, out_gmem, warpgroup, **shared, **options)
    pl.when(warpgroup == PRODUCER)(block.produce)
    pl.when(warpgroup < PRODUCER)(block.compute)


@dataclasses.dataclass(frozen=True, eq=False)
class _ThreadBlock:
    """What one thread block sees and does.

    Attributes:
        q_gmem: `[T rounded up to 8, H, D]`.
        k_gmem, v_gmem: `[layers * blocks, KV, block_size, D]`.
        first_gmem: `[1]`, the layer's first block.
        tables_gmem: `[S, B]`.
        work_gmem, count_gmem: see `_tiles`.
        masks_gmem: `[2, T rounded up to 128]` draft masks and how many keys they hide, or `None`.
        out_gmem: `[T, H, D]`.
        warpgroup: index of this one.
        *_smem: see `mixed`, as the barriers: of what has arrived, has been read, is `clean` of
            what lies past a sequence's end, and whose turn with the tensor cores it is.
    """

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    first_gmem: Any
    tables_gmem: Any
    work_gmem: Any
    count_gmem: Any
    masks_gmem: Any
    out_gmem: Any
    warpgroup: Any
    _: dataclasses.KW_ONLY
    config: Config
    group: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    q_smem: Any
    out_smem: Any
    k_smem: Any
    v_smem: Any
    p_smem: Any
    q_barrier: Any
    k_barriers: Any
    v_barriers: Any
    q_read: Any
    k_read: Any
    v_read: Any
    clean: Any
    turn: Any

    @property
    def is_interpreted(self) -> bool:
        return self.p_smem is not None

    def produce(self):
        """Bring in what the items need."""
        stages = self.config.stages
        if not self.is_interpreted:
            plgpu.set_max_registers(24, action="decrease")
        items, steps = self._each_item(self._load)

        # The last arrivals are waited for, too: barriers are left as they were found.
        pl.when(items > 0)(lambda: plgpu.barrier_wait(self.q_read))

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(self.k_read.at[lax.rem(step, stages)])
            plgpu.barrier_wait(self.v_read.at[lax.rem(step, stages)])

    def compute(self):
        """Attend, with 64 rows of each item."""
        if not self.is_interpreted:
            plgpu.set_max_registers(240, action="increase")
        pl.when(self.warpgroup == 1)(self._end_turn)
        self._each_item(self._attend)
        pl.when(self.warpgroup == 0)(self._pass_turn)
        pl.when(self.warpgroup == 1)(self._wait_for_turn)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _each_item(self, run: Callable[[_Item, Array, Array], None]) -> tuple[Array, Array]:
        """Run the items of this thread block: every n-th, from either end of n in turns.

        Long ones come first, so that all thread blocks get about as much. `run` gets an item, how
        many were before it, and their steps. How many there were in the end is returned.
        """
        block, blocks = lax.axis_index("block"), lax.axis_size("block")
        heads = self.q_gmem.shape[1]
        count = self.count_gmem[0] * heads
        most_hidden = 0 if self.masks_gmem is None else MASK_BITS - 1

        def index(turn):
            return turn * blocks + jnp.where(lax.rem(turn, 2) == 0, block, blocks - 1 - block)

        def look_up(turn):
            row = lax.div(jnp.clip(index(turn), 0, jnp.maximum(count - 1, 0)), heads)
            return tuple(self.work_gmem[i, row] for i in range(5))

        def run_one(turn, carry):
            before, work = carry
            following = look_up(turn + 1)  # now, and not when it is waited for
            head = lax.rem(index(turn), heads)
            item = _item(head, work, self.config.tile, self.sliding_window, most_hidden)
            run(item, turn, before)
            return before + item.end - item.begin, following

        turns = lax.div(count, blocks)
        turns += (index(turns) < count).astype(jnp.int32)
        steps, _ = lax.fori_loop(0, turns, run_one, (jnp.int32(0), look_up(0)))
        return turns, steps

    # --- the producer

    def _load(self, item: _Item, items_before: Array, steps_before: Array) -> None:
        """Bring in an item's queries, and its keys and values step by step."""
        block_size = self.k_gmem.shape[2]
        copies, stages = self.config.tile // block_size, self.config.stages
        first_block = self.first_gmem[0]
        last_block = lax.div(item.length + (block_size - 1), block_size) - 1

        def fetch_queries():
            pl.when(items_before > 0)(lambda: plgpu.barrier_wait(self.q_read))
            for i in range(2):
                rows = pl.ds(pl.multiple_of(item.top + i * ROWS, 8), ROWS)
                plgpu.copy_gmem_to_smem(
                    self.q_gmem.at[rows, item.head], self.q_smem.at[i], self.q_barrier
                )

        def fetch(i, slot, cache_gmem, tile_smem, barriers):
            for j in range(copies):
                index = jnp.minimum(i * copies + j, last_block)
                block = first_block + self.tables_gmem[item.sequence, index]
                plgpu.copy_gmem_to_smem(
                    cache_gmem.at[block, lax.div(item.head, self.group)],
                    tile_smem.at[slot, pl.ds(j * block_size, block_size)],
                    barriers.at[slot],
                )

        @pl.loop(item.begin, item.end)
        def _(i):
            step = steps_before + i - item.begin
            slot = lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(self.k_read.at[slot]))
            fetch(i, slot, self.k_gmem, self.k_smem, self.k_barriers)
            pl.when(i == item.begin)(fetch_queries)  # these wait longer, for the item before
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(self.v_read.at[slot]))
            fetch(i, slot, self.v_gmem, self.v_smem, self.v_barriers)

    # --- turns of the two that compute

    def _end_turn(self) -> None:
        if self.config.take_turns:
            plgpu.barrier_arrive(self.turn)

    def _wait_for_turn(self) -> None:
        if self.config.take_turns:
            plgpu.barrier_wait(self.turn)

    def _pass_turn(self) -> None:
        self._end_turn()
        self._wait_for_turn()

    # --- one that computes

    def _attend(self, item: _Item, _, steps_before: Array) -> None:
        """Compute 64 rows of an item's result, and store them."""
        D = self.q_gmem.shape[2]
        first_row = item.top + self.warpgroup * ROWS
        by_row = plgpu.Layout.WGMMA.reduce(1)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
        row_max = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row)
        row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
        masks = None
        if self.masks_gmem is not None:
            masks = load_masks(self.masks_gmem, pl.ds(first_row, ROWS), self.sliding_window)
        plgpu.barrier_wait(self.q_barrier)
        pl.when(self.warpgroup == 1)(self._wait_for_turn)

        step = functools.partial(self._step, item, first_row, steps_before)
        inner, edge = step, functools.partial(step, hide=functools.partial(self._hide, masks))
        carry = acc, row_max, row_sum
        if self.sliding_window is not None:
            carry = lax.fori_loop(item.begin, item.full_begin, edge, carry)
        carry = lax.fori_loop(item.full_begin, item.full_end, inner, carry)
        acc, row_max, row_sum = lax.fori_loop(item.full_end, item.end, edge, carry)
        # The second's last product needs not wait until the first has stored its result, nor the
        # first's next one until the second has.
        pl.when(self.warpgroup == 0)(self._pass_turn)
        pl.when(self.warpgroup == 1)(self._end_turn)

        inverse = 1 / jnp.maximum(row_sum, 1e-30)
        self._store(item, first_row, acc * lax.broadcast_in_dim(inverse, acc.shape, [0]))

    def _step(self, item: _Item, first_row: Array, steps_before: Array, i, carry, hide=None):
        """Take the keys and values of one step into `carry`; `hide` does so with scores."""
        acc, row_max, row_sum = carry
        slot = lax.rem(steps_before + i - item.begin, self.config.stages)
        scores = self._scores(slot)
        if not self.config.shares:
            pl.when(i + 1 == item.end)(lambda: plgpu.barrier_arrive(self.q_read))
        factor = self.scale * LOG2E
        if self.soft_cap is not None:
            scores = jnp.tanh(scores * (self.scale / self.soft_cap))
            factor = self.soft_cap * LOG2E
        if hide is not None:
            # Scaled first: a fused multiply-add of MASKED would leave its rounding error.
            scores = hide(scores, factor, i * self.config.tile - first_row - item.shift)
            factor = 1.0
        # The scale is applied in the exponent's multiply-add.
        new_max = jnp.maximum(row_max, scores.max(axis=1) * factor)
        decay = jnp.exp2(row_max - new_max)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_max, scores.shape, [0]))
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        row_sum = row_sum * decay + weights.sum(axis=1)
        weights = weights.astype(self.q_gmem.dtype)
        if not self.is_interpreted:
            acc, row_sum, new_max, weights = lax.optimization_barrier(
                (acc, row_sum, new_max, weights)
            )

        self._end_turn()
        plgpu.barrier_wait(self.v_barriers.at[slot])
        self._wait_for_turn()
        if hide is not None:
            past_the_end = (i + 1) * self.config.tile > item.length
            pl.when(past_the_end)(lambda: self._clear_values(item, i, slot))
        return self._add_values(acc, weights, slot), new_max, row_sum

    def _scores(self, slot: Array) -> Array:
        """Return the products of queries and keys."""

        def qk(scores):
            keys = self.k_smem.at[slot].transpose((1, 0))
            plgpu.wgmma(scores, self.q_smem.at[self.warpgroup], keys)
            self._pass_turn()
            return scores[...]

        plgpu.barrier_wait(self.k_barriers.at[slot])
        scores = pl.run_scoped(qk, plgpu.ACC((ROWS, self.config.tile), jnp.float32))
        plgpu.barrier_arrive(self.k_read.at[slot])
        return scores

    def _hide(self, masks, scores: Array, factor: float, first_key: Array) -> Array:
        """Return scores times `factor`, those of keys that a row does not see very low.

        `first_key` is the position of the step's first key less that of the first row.
        """
        iota = functools.partial(
            plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA
        )
        ahead = iota(1) - iota(0) + first_key  # key less query position
        if masks is not None:
            visible = visible_keys(-ahead, *masks, self.sliding_window)
        else:
            visible = ahead <= 0
            if self.sliding_window is not None:
                visible &= ahead > -self.sliding_window
        return jnp.where(visible, scores * factor, MASKED)

    def _clear_values(self, item: _Item, i: Array, slot: Array) -> None:
        """Make values past the sequence's end zero: NaN is not silenced by a weight of 0."""
        tile = self.config.tile

        @pl.when(self.warpgroup == 0)
        def _():
            for first in range(0, tile, ROWS):  # so that few registers suffice
                part = self.v_smem.at[slot, pl.ds(first, ROWS)]
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                index = plgpu.broadcasted_iota(
                    jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA
                )
                inside = index < item.length - i * tile - first
                part[...] = jnp.where(inside, values, jnp.zeros_like(values))
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.clean)

        pl.when(self.warpgroup == 1)(lambda: plgpu.barrier_wait(self.clean))

    def _add_values(self, acc: Array, weights: Array, slot: Array) -> Array:
        """Return `acc` plus the products of weights and values."""

        def pv(product):
            left = self.p_smem.at[self.warpgroup] if self.is_interpreted else weights
            plgpu.wgmma(product, left, self.v_smem.at[slot])
            if self.is_interpreted:
                return product[...]

        if self.is_interpreted:
            self.p_smem[self.warpgroup] = weights
            plgpu.commit_smem()
            total: Any = acc + pl.run_scoped(pv, plgpu.ACC(acc.shape, jnp.float32))
        else:
            total = pl.run_state(pv)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(self.v_read.at[slot])
        return total

    def _store(self, item: _Item, first_row: Array, result: Array) -> None:
        """Write those of 64 rows that are the sequence's."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
        self.out_smem[self.warpgroup] = result.astype(self.q_gmem.dtype)
        plgpu.commit_smem()
        begin = jnp.maximum(item.low, first_row)
        count = jnp.minimum(item.high, first_row + ROWS) - begin

        def store(row, rows):
            plgpu.copy_smem_to_gmem(
                self.out_smem.at[self.warpgroup, pl.ds(row - first_row, rows)],
                self.out_gmem.at[pl.ds(row, rows), item.head],
            )

        # Any number of rows as a sum of powers of two, TMA boxes being static.
        for bit in range(ROWS.bit_length()):
            rows = 1 << bit
            below = count & (rows - 1)
            pl.when((count > 0) & ((count & rows) != 0))(
                functools.partial(store, begin + below, rows)
            )
        if self.config.shares:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.q_read)
