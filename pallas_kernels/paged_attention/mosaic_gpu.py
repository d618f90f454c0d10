"""Paged attention for few queries a sequence (decode, draft verification) on Hopper.

Called by `op.paged_attention`. One thread block works on one sequence, one key/value head and one
split of the context: it brings tiles of keys and values in by TMA, one copy a block of the cache,
and keeps a running softmax over them for the query rows of its head group. The rows are padded to
the 64 that a wgmma has; the tensor cores have time for that while the memory system is the limit.

More queries than rows (the verification of long drafts, many query heads a key/value head) go to
several thread blocks, as if each part were a sequence of its own that ends with it: which reads
keys and values again, but from the L2 cache, since the parts run at once.

Where a context is split, a second launch merges the results. Thread blocks that merge among
themselves would have to be one cluster, which was slower (it leaves multiprocessors idle), or count
their arrivals in memory that someone has to clear.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
MAX_PARTS = 2  # of a sequence's queries
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
    hide each other's latencies; where there is one for each multiprocessor, larger tiles instead.
    There are splits until every multiprocessor has a thread block; and, for lengths that differ,
    where the block tables have room for long ones (each costs a thread block even where `splits_of`
    leaves it nothing to do).
    """
    items, keys = S * KV, blocks_per_sequence * block_size
    by_length = min(keys // (1024 if D == 64 else 1536), 2048 // items, 4)
    splits = min(max(round(SMS / items), by_length), keys // 128, MAX_SPLITS)
    is_one_each = round(SMS / items) == 1 and items <= SMS and D <= 128
    return Config(128 if is_one_each else 64, 2, max(splits, 1))


def splits_of(seq_lens: Array, KV: int, sliding_window: int | None, config: Config) -> Array:
    """Return `[S]`, into how many splits each context goes: all splits are about equally long.

    They are as long as the mean context, so that equal ones stay whole, and of different ones none
    is read when all others have been; or shorter, until every multiprocessor has a split to read.
    """
    if config.splits == 1:
        return jnp.ones_like(seq_lens)
    seen = seq_lens if sliding_window is None else jnp.minimum(seq_lens, sliding_window)
    contexts = jnp.maximum((seq_lens > 0).sum(), 1)
    length = seen.sum() / contexts * jnp.minimum(contexts * KV / SMS, 1)
    splits = jnp.round(seen / jnp.maximum(length, config.tile))
    return jnp.clip(splits, 1, config.splits).astype(jnp.int32)


def takes(max_query_len: int, group: int) -> bool:
    """Return whether sequences have few enough queries for `decode`, `group` heads each."""
    return pl.cdiv(max_query_len, ROWS // group) <= MAX_PARTS


def in_parts(
    query_start_loc: Array, seq_lens: Array, parts: int, part_len: int
) -> tuple[Array, Array]:
    """Cut each sequence's queries into parts, and let each be a sequence that ends with it.

    Returns:
        `query_start_loc [S * parts + 1]` and `seq_lens [S * parts]`, 0 for a part without queries.
    """
    starts, counts = query_start_loc[:-1, None], jnp.diff(query_start_loc)[:, None]
    begins, ends = (
        jnp.minimum(part_len * jnp.arange(first, first + parts), counts) for first in (0, 1)
    )
    lengths = jnp.where(begins < ends, seq_lens[:, None] - counts + ends, 0)
    return jnp.append(starts + begins, query_start_loc[-1]), lengths.reshape(-1)


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
    """See `op.paged_attention`, for what it `takes`.

    With `into [T, H, D]`, sequences have one query each, and its row is where `query_start_loc`
    says. Their results are written into that array, all other rows of which stay as they are.
    """
    T, H, D = q.shape
    S, B = block_tables.shape
    KV, block_size = k_cache.shape[2:4]
    G, Q = H // KV, max_query_len
    config = config or choose_config(S, KV, D, B, block_size)
    splits = config.splits
    if Q * G > ROWS:
        Q = ROWS // G
        parts = pl.cdiv(max_query_len, Q)
        query_start_loc, seq_lens = in_parts(query_start_loc, seq_lens, parts, Q)
        block_tables = jnp.repeat(block_tables, parts, axis=0)
        S = S * parts

    # A head group's rows come in TMA tiles of 8; where there are fewer, zeros fill the tile.
    num_rows = Q * G
    if Q == 1 and (G < 8 or G % 8 == 0):
        rows, is_gathered = q.reshape(T, KV, G, D), into is None
    else:
        of_sequence = jnp.minimum(query_start_loc[:-1, None] + jnp.arange(Q), T - 1)
        rows = jnp.moveaxis(q[of_sequence].reshape(S, Q, KV, G, D), 1, 2)
        rows, is_gathered = rows.reshape(S, KV, num_rows, D), True
        if num_rows > 8:
            rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -num_rows % 8), (0, 0)))
    masks = [] if draft_mask is None else [_row_masks(draft_mask, query_start_loc, Q, G)]
    contexts = jnp.stack([seq_lens, splits_of(seq_lens, KV, sliding_window, config)])

    out_type = [jax.ShapeDtypeStruct((T, H, D), q.dtype)]
    if splits > 1:
        out_type += [
            jax.ShapeDtypeStruct((S, KV, splits, num_rows, D), jnp.float32),
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
            # A result leaves through the memory of the tiles, when they have been read.
            plgpu.SMEM((ROWS, D), q.dtype),
            plgpu.SMEM((ROWS, D), jnp.float32),
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
        is_gathered=is_gathered,
        config=config,
        group=G,
        queries=Q,
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
        contexts,
        *masks,
    )
    grid = {"split": splits, "head": KV, "sequence": S}
    out, *partial = launch("decode", body, arguments, grid, into, out_type, scratch)
    if splits == 1:
        return out
    body = functools.partial(_merge_body, group=G, is_scattered=into is not None)
    grid = {"row": num_rows, "head": KV, "sequence": S}
    return launch("merge", body, (*partial, query_start_loc, contexts), grid, out, out_type[:1])[0]


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
    """Run a kernel; return its results, the first of which is `into`, changed, if that is given."""
    in_place = [] if into is None else [jax.new_ref(into)]

    def scoped(*refs):
        pl.run_scoped(functools.partial(body, *refs), **scratch or {})

    results: Any = pl.kernel(
        scoped,
        out_type=out_type[len(in_place) :],
        mesh=plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or False,
        name=f"paged_attention_{name}",
    )(*arguments, *in_place)
    return [*map(jax.freeze, in_place), *results]


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


def _decode_body(*references, is_masked: bool, tiles_smem, **options):
    """Attend, if there is something: else that takes a thread block 7 us, returning less than 1."""
    inputs, masks_gmem, results = references[:7], None, references[7:]
    if is_masked:
        masks_gmem, *results = results
    (k_smem, v_smem), out_smem, partial_smem = tiles_smem
    shared = {"k_smem": k_smem, "v_smem": v_smem}
    shared |= {"out_smem": out_smem, "partial_smem": partial_smem}
    block = _ThreadBlock(*inputs, masks_gmem, *results, **shared, **options)
    sequence, split = lax.axis_index("sequence"), lax.axis_index("split")
    length, splits = block.contexts_gmem[0, sequence], block.contexts_gmem[1, sequence]
    pl.when((length > 0) & (split < splits))(functools.partial(block.attend, length, splits))
    if block.queries == 1 and not block.is_scattered:
        # The slot has a row all the same, to be finite.
        pl.when((length == 0) & (split == 0))(block.clear)


class _Queries(NamedTuple):
    """The queries of a sequence.

    Attributes:
        start: its first row.
        num: how many there are.
    """

    start: Array
    num: Array | int


class _Keys(NamedTuple):
    """What a split of a context is.

    Attributes:
        length: of the whole context.
        begin: first tile.
        steps: tiles.
        first_block: of the layer, in the cache.
        last_block: of the context, in its block table.
    """

    length: Array
    begin: Array
    steps: Array
    first_block: Array
    last_block: Array


@dataclasses.dataclass(frozen=True, eq=False)
class _ThreadBlock:
    """What one thread block sees and does.

    Attributes:
        q_gmem: `[S, KV, rows, D]` if queries are gathered, else `[T, KV, rows, D]`.
        k_gmem, v_gmem: `[layers * blocks, KV, block_size, D]`.
        first_gmem: `[1]`, the layer's first block.
        tables_gmem: `[S, B]`.
        starts_gmem: `[S + 1]`.
        contexts_gmem: `[2, S]`, lengths, and how many splits those have.
        masks_gmem: `[2, S, ROWS]` of `_row_masks`, or `None`.
        out_gmem: `[T, H, D]`, for contexts of one split.
        partial_gmem: `[S, KV, splits, Q * G, D]`, of those that have several.
        lse_gmem: beside that `[S, KV, splits, ROWS]`, logarithms of the sums of exponentials.
        is_scattered, is_gathered: whether the results' rows are where the queries' are in the flat
            array, and whether those were brought together before.
        *_smem, *_barrier: see `decode`.
    """

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    first_gmem: Any
    tables_gmem: Any
    starts_gmem: Any
    contexts_gmem: Any
    masks_gmem: Any
    out_gmem: Any
    partial_gmem: Any = None
    lse_gmem: Any = None
    _: dataclasses.KW_ONLY
    is_scattered: bool
    is_gathered: bool
    config: Config
    group: int
    queries: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    q_smem: Any
    k_smem: Any
    v_smem: Any
    out_smem: Any
    partial_smem: Any
    lse_smem: Any
    p_smem: Any
    q_barrier: Any
    k_barriers: Any
    v_barriers: Any

    def clear(self) -> None:
        """Make the rows of this head group zero."""
        for i in range(self.group):
            head = lax.axis_index("head") * self.group + i
            _clear_row(self.out_gmem, lax.axis_index("sequence"), head)

    def attend(self, length: Array, splits: Array) -> None:
        """Compute the result of this split, one of `splits` of a context of that length."""
        queries = self._fetch_queries()
        keys = self._keys(queries, length, splits)
        for i in range(self.config.stages):

            @pl.when(i < keys.steps)
            def _(i=i):
                self._fetch(keys, i, i, self.k_gmem, self.k_smem, self.k_barriers)
                self._fetch(keys, i, i, self.v_gmem, self.v_smem, self.v_barriers)

        D = self.q_gmem.shape[3]
        by_row = plgpu.Layout.WGMMA.reduce(1)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
        row_max = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row)
        row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
        masks = None
        if self.masks_gmem is not None:
            sequence = lax.axis_index("sequence")
            masks = load_masks(self.masks_gmem, sequence, self.sliding_window)
        plgpu.barrier_wait(self.q_barrier)

        step = functools.partial(self._step, queries, keys, masks)
        carry = lax.fori_loop(0, keys.steps, step, (acc, row_max, row_sum))
        self._store(queries, splits, *carry)

    def _fetch_queries(self) -> _Queries:
        """Ask for this head group's rows; past the last one TMA reads zeros."""
        sequence, head = lax.axis_index("sequence"), lax.axis_index("head")
        loaded = -(-self.q_gmem.shape[2] // 8) * 8
        start, count = _queries(sequence, self.starts_gmem, self.queries, self.is_scattered)
        # Not static: a static slice may not pass the end.
        rows = pl.ds(pl.multiple_of(0 * sequence, 8), loaded)
        plgpu.copy_gmem_to_smem(
            self.q_gmem.at[sequence if self.is_gathered else start, head, rows],
            self.q_smem.at[pl.ds(0, loaded)],
            self.q_barrier,
        )
        return _Queries(start, count)

    def _keys(self, queries: _Queries, length: Array, splits: Array) -> _Keys:
        """Return which keys are this split's: as many tiles as another's, but at the end."""
        tile, block_size = self.config.tile, self.k_gmem.shape[2]
        first_block = self.first_gmem[0]
        last_tile = lax.div(length + (tile - 1), tile)
        first_tile = 0
        if self.sliding_window is not None:
            lowest = length - queries.num - (self.sliding_window - 1)
            if self.masks_gmem is not None:
                lowest -= MASK_BITS - 1
            first_tile = lax.div(jnp.maximum(lowest, 0), tile)
        share = lax.div(last_tile - first_tile + (splits - 1), splits)
        begin = first_tile + lax.axis_index("split") * share
        steps = jnp.clip(last_tile - begin, 0, share)
        last_block = jnp.maximum(lax.div(length + (block_size - 1), block_size) - 1, 0)
        return _Keys(length, begin, steps, first_block, last_block)

    def _fetch(self, keys: _Keys, step, slot, cache_gmem, tile_smem, barriers) -> None:
        """Start the copies of one tile; past the end its last block comes again, for nothing."""
        block_size = self.k_gmem.shape[2]
        copies = self.config.tile // block_size
        sequence, head = lax.axis_index("sequence"), lax.axis_index("head")
        for i in range(copies):
            index = jnp.minimum((keys.begin + step) * copies + i, keys.last_block)
            plgpu.copy_gmem_to_smem(
                cache_gmem.at[keys.first_block + self.tables_gmem[sequence, index], head],
                tile_smem.at[slot, pl.ds(i * block_size, block_size)],
                barriers.at[slot],
            )

    def _step(self, queries: _Queries, keys: _Keys, masks, i: Array, carry):
        """Take one tile of keys and values into `carry`, and ask for a later one."""
        acc, row_max, row_sum = carry
        stages, tile = self.config.stages, self.config.tile
        slot = lax.rem(i, jnp.int32(stages))
        key = (keys.begin + i) * tile  # position of the tile's first key

        def fetch_next(*memory):
            pl.when(i + stages < keys.steps)(lambda: self._fetch(keys, i + stages, slot, *memory))

        plgpu.barrier_wait(self.k_barriers.at[slot])
        scores = self._scores(slot)
        fetch_next(self.k_gmem, self.k_smem, self.k_barriers)
        if self.soft_cap is None:
            scores = scores * (self.scale * LOG2E)
        else:
            scores = jnp.tanh(scores * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2E)
        visible = self._visible(queries, masks, key - keys.length)
        scores = jnp.where(visible, scores, MASKED)

        new_max = jnp.maximum(row_max, scores.max(axis=1))
        decay = jnp.exp2(row_max - new_max)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_max, scores.shape, [0]))
        row_sum = row_sum * decay + weights.sum(axis=1)
        weights = weights.astype(self.q_smem.dtype)

        plgpu.barrier_wait(self.v_barriers.at[slot])
        pl.when(key + tile > keys.length)(lambda: self._clear_values(slot, keys.length - key))
        product = self._weigh_values(weights, slot)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0]) + product
        fetch_next(self.v_gmem, self.v_smem, self.v_barriers)
        return acc, new_max, row_sum

    def _scores(self, slot: Array) -> Array:
        """Return the products of queries and keys."""

        def qk(scores):
            plgpu.wgmma(scores, self.q_smem, self.k_smem.at[slot].transpose((1, 0)))
            return scores[...]

        return pl.run_scoped(qk, plgpu.ACC((ROWS, self.config.tile), jnp.float32))

    def _visible(self, queries: _Queries, masks, first_key: Array) -> Array:
        """Return which keys of a tile each row sees; its first is at the end plus `first_key`."""
        shape, window = (ROWS, self.config.tile), self.sliding_window
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        position = column + first_key  # from the end of the sequence, negative
        if self.queries == 1 and masks is None:
            visible = position < 0
            return visible if window is None else visible & (position >= -window)
        by_row = plgpu.Layout.WGMMA.reduce(1)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row)
        query = lax.broadcast_in_dim(lax.div(row, self.group) - queries.num, shape, [0])
        if masks is not None:
            return visible_keys(query - position, *masks, window)
        visible = position <= query
        return visible if window is None else visible & (position > query - window)

    def _clear_values(self, slot: Array, inside: Array) -> None:
        """Make values past the end zero: they may be NaN, which a weight of 0 does not silence."""
        values = plgpu.load(self.v_smem.at[slot], layout=plgpu.Layout.WGMMA)
        index = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
        self.v_smem[slot] = jnp.where(index < inside, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    def _weigh_values(self, weights: Array, slot: Array) -> Array:
        """Return the products of weights and values."""
        if self.p_smem is not None:
            self.p_smem[...] = weights
            plgpu.commit_smem()

        def pv(product):
            left = weights if self.p_smem is None else self.p_smem
            plgpu.wgmma(product, left, self.v_smem.at[slot])
            return product[...]

        return pl.run_scoped(pv, plgpu.ACC((ROWS, self.q_gmem.shape[3]), jnp.float32))

    def _store(
        self, queries: _Queries, splits: Array, acc: Array, row_max: Array, row_sum: Array
    ) -> None:
        """Write the rows of the queries; of one split among several, with what a merge wants."""
        row_sum = jnp.maximum(row_sum, 1e-30)
        acc = acc * lax.broadcast_in_dim(1 / row_sum, acc.shape, [0])
        if self.config.splits == 1:
            self._store_rows(queries, acc)
        else:
            lse = row_max + jnp.log2(row_sum)
            pl.when(splits == 1)(functools.partial(self._store_rows, queries, acc))
            pl.when(splits > 1)(functools.partial(self._store_partial, acc, lse))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _store_rows(self, queries: _Queries, acc: Array) -> None:
        self.out_smem[...] = acc.astype(self.out_smem.dtype)
        plgpu.commit_smem()
        heads = pl.ds(lax.axis_index("head") * self.group, self.group)
        for i in range(self.queries):

            @pl.when(i < queries.num)
            def _(i=i):
                rows = pl.ds(i * self.group, self.group)
                plgpu.copy_smem_to_gmem(
                    self.out_smem.at[rows], self.out_gmem.at[queries.start + i, heads]
                )

    def _store_partial(self, acc: Array, lse: Array) -> None:
        self.partial_smem[...] = acc
        self.lse_smem[...] = lse
        plgpu.commit_smem()
        of_split = tuple(lax.axis_index(name) for name in ("sequence", "head", "split"))
        rows = pl.ds(0, self.queries * self.group)
        plgpu.copy_smem_to_gmem(self.partial_smem.at[rows], self.partial_gmem.at[of_split])
        plgpu.copy_smem_to_gmem(self.lse_smem, self.lse_gmem.at[of_split])


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
    contexts_gmem,  # [2, S], lengths, and how many splits those have
    out_gmem,  # [T, H, D]
    *,
    group: int,
    is_scattered: bool,
):
    D = splits_gmem.shape[4]
    row, head = lax.axis_index("row"), lax.axis_index("head")
    sequence = lax.axis_index("sequence")
    length, splits = contexts_gmem[0, sequence], contexts_gmem[1, sequence]
    queries = splits_gmem.shape[3] // group
    start, query_len = _queries(sequence, starts_gmem, queries, is_scattered)
    query, head_in_group = lax.div(row, group), lax.rem(row, group)

    @pl.when((query < query_len) & (length > 0) & (splits > 1))
    def _():
        # The weight of a split is its share of the sum of exponentials. All are loaded at once; for
        # those that this context does not have, its last one comes again, and weighs nothing.
        last = [jnp.minimum(split, splits - 1) for split in range(splits_gmem.shape[2])]
        lse = [lse_gmem[sequence, head, index, row] for index in last]
        lse = [jnp.where(split < splits, x, MASKED) for split, x in enumerate(lse)]
        largest = functools.reduce(jnp.maximum, lse)
        weights = [jnp.exp2(x - largest) for x in lse]
        total = functools.reduce(jnp.add, weights)
        load = functools.partial(plgpu.load, layout=_row_layout(D), optimized=False)
        results = [
            load(splits_gmem.at[sequence, head, index, row]) * (weight / total)
            for index, weight in zip(last, weights, strict=True)
        ]
        merged = functools.reduce(jnp.add, results).astype(out_gmem.dtype)
        out_gmem[start + query, head * group + head_in_group] = merged
