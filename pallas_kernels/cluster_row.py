"""A row of logits in the shared memory of a thread block cluster; device code of several kernels.

One thread block reads from memory too slowly for a row of 128,256 logits, and has no room for it.
So the blocks of a cluster hold a share each, pass over it as often as they need, and tell each
other what they found through a board in global memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from itertools import batched

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels import cluster

TILE = 512  # entries that a thread block works on at once: 4 a thread
MAX_BLOCKS = 8  # of a cluster on any Hopper GPU
SMEM_BYTES = 224 * 1024  # for the share of one thread block
ALL = -1  # marks of all tiles
WORDS = 8  # of one message; 32 bytes, so that two messages share no sector of the L1 cache


@dataclasses.dataclass(frozen=True)
class Config:
    """How a row is spread.

    Attributes:
        blocks: thread blocks of a cluster.
        tiles: of `TILE` entries, in each.
        unroll: tiles that are worked on at once, or on their way from global memory.
    """

    blocks: int
    tiles: int
    unroll: int

    def __post_init__(self):
        if self.blocks not in (1, 2, 4, 8):
            raise ValueError(f"{self.blocks=} must be 1, 2, 4 or 8")
        if self.tiles < 1 or self.unroll < 1 or self.tiles % self.unroll:
            raise ValueError(f"{self.tiles=} must be a positive multiple of {self.unroll=}")


def choose_config(V: int) -> Config:
    """Return how a row of `V` entries is spread: over many blocks, as each reads slowly."""
    tiles = -(-V // TILE)
    blocks = next(b for b in (8, 4, 2, 1) if b <= tiles)
    share = -(-tiles // blocks)
    unroll = min(share, 8)
    return Config(blocks, -(-share // unroll) * unroll, unroll)


def unsupported(logits: jax.ShapeDtypeStruct) -> str | None:
    """Return why rows like these `[R, V]` cannot be held, or `None` if they can."""
    if logits.dtype != jnp.float32:
        return f"the logits are {logits.dtype}, not float32"
    if 4 * TILE * choose_config(logits.shape[1]).tiles > SMEM_BYTES:
        return f"{logits.shape[1]} logits do not fit the shared memory of {MAX_BLOCKS} blocks"
    return None


def whole_tiles(x: Array) -> Array:
    """Pad the last axis of `x` to one tile; what is wider is read in overlapping tiles."""
    missing = max(TILE - x.shape[-1], 0)
    return jnp.pad(x, ((0, 0), (0, missing))) if missing else x


class Row:
    """The part of a row that this thread block holds. Exists while a kernel body is traced.

    A tile that would pass the end of the row begins earlier; what it shares with the tile before,
    and what lies past the last entry, has the value that is given for absent entries.

    Args:
        smem: `[tiles, TILE]` float32, the entries.
        board: `[R, turns, blocks, WORDS]` float32 in global memory, for messages.
        barrier: see `cluster.barrier`.
        vocab: entries of a row.
        width: entries of a row in global memory, at least `TILE`.
    """

    def __init__(
        self,
        smem,
        board,
        barrier,
        *,
        vocab: int,
        width: int,
        config: Config,
    ) -> None:
        self.index, self.block = lax.axis_index("row"), lax.axis_index("block")
        self._smem, self._board, self._barrier = smem, board, barrier
        self.vocab, self.blocks, self.unroll = vocab, config.blocks, config.unroll
        self._width = width
        self._config = config
        # As many numbers at once as the rows in global memory are aligned to.
        self._layout = plgpu.Layout.WG_STRIDED((TILE,), vec_size=math.gcd(width, 4))

    def __getitem__(self, tile: Array) -> Array:
        """Return a tile's entries `[TILE]`."""
        return plgpu.load(self._smem.at[tile], layout=self._layout)

    def __setitem__(self, tile: Array, value: Array) -> None:
        self._smem[tile] = value

    def full(self, value: Array | float | int) -> Array:
        """Return a tile of equal numbers."""
        return plgpu.layout_cast(jnp.full((TILE,), value), self._layout)

    def positions(self, tile: Array) -> Array:
        """Return where a tile's entries are in the row, `[TILE]`."""
        lane = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=self._layout)
        return lane + self._start(tile)

    def fetch(self, gmem, row: Array, tile: Array) -> Array:
        """Return a tile of row `row` of `gmem [rows, width]`."""
        return plgpu.load(gmem.at[row, pl.ds(self._start(tile), TILE)], layout=self._layout)

    def where_present(self, tile: Array, value: Array, absent: float | int) -> Array:
        """Replace what is no entry of the tile."""
        position = self.positions(tile)
        value = jnp.where(position >= self._nominal(tile), value, absent)
        return (
            value if self._width == self.vocab else jnp.where(position < self.vocab, value, absent)
        )

    def fold(
        self, step: Callable, initial, marks: Array | None = None, together: int | None = None
    ):
        """Return `step(tiles, carry)` over all tiles, a list of `together` of them at a time.

        With `marks` (see `mark`) over the marked tiles only, one at a time, unless all are.
        """
        n = together or self.unroll

        def dense():
            def visit(i, carry):
                return step([i * n + j for j in range(n)], carry)

            return lax.fori_loop(0, self._config.tiles // n, visit, initial)

        def sparse():
            def visit(tile, carry):
                marked = (lax.shift_right_logical(marks, tile & 31) & 1) > 0
                return lax.cond(marked, lambda: step([tile], carry), lambda: carry)

            return lax.fori_loop(0, self._config.tiles, visit, initial)

        return dense() if marks is None else lax.cond(marks == ALL, dense, sparse)

    def mark(self, bound: Array) -> Array:
        """Return a bit for each tile that has an entry whose bits are at most `bound`, or `ALL`.

        Tiles a multiple of 32 apart share a bit. `ALL` if they are many: passing over all of them
        at full speed then takes less time.
        """

        def step(tiles, carry):
            marks, marked = carry
            for some in batched(tiles, 3):  # three counts of up to TILE fit one word
                within = [
                    (lax.bitcast_convert_type(self[tile], jnp.int32) <= bound).astype(jnp.int32)
                    for tile in some
                ]
                counts = functools.reduce(
                    jnp.add, [w << (10 * i) for i, w in enumerate(within)]
                ).sum()
                for i, tile in enumerate(some):
                    found = ((counts >> (10 * i)) & 1023) > 0
                    marks = jnp.where(found, marks | (1 << (tile & 31)), marks)
                    marked = jnp.where(found, marked + 1, marked)
            return marks, marked

        marks, marked = self.fold(step, (jnp.int32(0), jnp.int32(0)))
        return jnp.where(2 * marked > self._config.tiles, ALL, marks)

    def load(self, gmem, keep: Array | bool = True) -> tuple[Array, Array, Array]:
        """Read the row from `gmem [R, width]`, and hold it if `keep`.

        Returns:
            How many entries of this block's share are not finite, the largest, and its position.
        """

        def step(tiles, carry):
            damaged, best = carry
            fetched = [self.fetch(gmem, self.index, tile) for tile in tiles]  # all on their way
            for tile, x in zip(tiles, fetched, strict=True):
                finite = self.where_present(tile, jnp.abs(x), 0.0) < jnp.inf
                damaged += 1 - finite.astype(jnp.int32)
            fetched = [
                self.where_present(tile, x, -jnp.inf)
                for tile, x in zip(tiles, fetched, strict=True)
            ]
            best = self.argmax_step(tiles, fetched, best)

            @pl.when(keep)
            def _():
                for tile, x in zip(tiles, fetched, strict=True):
                    self[tile] = x

            return damaged, best

        damaged, best = self.fold(step, (self.full(0), self.argmax_start()))
        return damaged.sum(), *self.argmax_end(best)

    def argmax(self) -> tuple[Array, Array]:
        """Return the largest entry of this block's share, and the first position that has it."""

        def step(tiles, best):
            return self.argmax_step(tiles, [self[tile] for tile in tiles], best)

        return self.argmax_end(self.fold(step, self.argmax_start()))

    def argmax_start(self) -> tuple[Array, Array]:
        """Return what `argmax_step` carries: the best of each lane, and its tile."""
        return self.full(-jnp.inf), self.full(0)

    def argmax_step(
        self, tiles: list[Array], values: list[Array], carry: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """Look at the values of some tiles, in order."""
        best, tile_of_best = carry
        for tile, x in zip(tiles, values, strict=True):
            better = x > best
            best = jnp.where(better, x, best)
            tile_of_best = jnp.where(better, self.full(tile), tile_of_best)
        return best, tile_of_best

    def argmax_end(self, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return the largest value, and the first position that has it."""
        best, tile_of_best = carry
        value = best.max()
        lane = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=self._layout)
        start = jnp.minimum(self._nominal(tile_of_best), self._width - TILE)
        return value, jnp.where(best == value, start + lane, self.vocab - 1).min()

    def remove(self, position: Array) -> None:
        """Make the entry at a position of this block's share as small as can be."""
        tile = jnp.clip(lax.div(position, TILE) - self.block * self._config.tiles, 0)
        tile = jnp.minimum(tile, self._config.tiles - 1)
        lane = jnp.clip(position - self._start(tile), 0, TILE - 1)
        self._smem[tile, lane] = jnp.float32(-jnp.inf)

    def post(self, turn: Array | int, *values: Array) -> None:
        """Put up to `WORDS` float32 scalars on the board, to be read after `sync`.

        Each message of a block has a `turn` of its own, a place on the board.
        """
        for i, value in enumerate(values):
            self._board[self.index, turn, self.block, i] = value

    def sync(self) -> None:
        """Wait for the other blocks; then what they have posted can be read."""
        if self._config.blocks > 1:
            cluster.wait(self._barrier)

    def read(self, turns: Sequence[Array | int], word: int) -> list[Array]:
        """Return a word of a message of each block, `turns[block]`."""
        return [self._board[self.index, turn, b, word] for b, turn in enumerate(turns)]

    def exchange(self, turn: Array | int, *values: Array) -> list[list[Array]]:
        """Tell the cluster up to `WORDS` float32 scalars; return each as every block has it."""
        if self._config.blocks == 1:
            return [[value] for value in values]
        self.post(turn, *values)
        self.sync()
        return [self.read([turn] * self._config.blocks, word) for word in range(len(values))]

    def _nominal(self, tile: Array | int) -> Array:
        return (self.block * self._config.tiles + tile) * TILE

    def _start(self, tile: Array | int) -> Array:
        return jnp.minimum(self._nominal(tile), self._width - TILE)


def total(values: Sequence[Array]) -> Array:
    """Return the sum of what the blocks have posted, the same in each of them."""
    return functools.reduce(jnp.add, values)


def largest(values: Sequence[Array], others: Sequence[Array]) -> tuple[Array, Array]:
    """Return the largest of some scalars, the first of equals, and its partner of `others`."""
    best, partner = values[0], others[0]
    for value, other in zip(values[1:], others[1:], strict=True):
        partner = jnp.where(value > best, other, partner)
        best = jnp.where(value > best, value, best)
    return best, partner


def run(
    body: Callable,
    operands: Sequence[Array],
    out_type: Sequence[jax.ShapeDtypeStruct],
    *,
    vocab: int,
    turns: int,
    config: Config,
    interpret: plgpu.InterpretGPUParams | None,
    name: str,
) -> list[Array]:
    """Run `body(row, *operands, *outputs)` for each row of `operands[0] [R, width]`.

    Args:
        body: a kernel body, run by each thread block of each row's cluster; it gets the `Row`.
        operands: arrays in global memory, the logits first.
        out_type: what the body writes.
        vocab: entries of a row.
        turns: exchanges of a row, at most.
        config: see `Config`.
        interpret: see `dispatch.interpreter`.
        name: of the kernel.
    """
    R, width = operands[0].shape
    board = jax.ShapeDtypeStruct((R, turns, config.blocks, WORDS), jnp.float32)

    def kernel(*refs, smem, barrier):
        *refs, board = refs
        row = Row(
            smem,
            board,
            barrier,
            vocab=vocab,
            width=width,
            config=config,
        )
        body(row, *refs)

    outputs = plgpu.kernel(
        kernel,
        out_type=[*out_type, board],
        scratch_types={
            "smem": plgpu.SMEM((config.tiles, TILE), jnp.float32),
            "barrier": cluster.barrier("block", interpret),
        },
        grid=(R,),
        grid_names=("row",),
        cluster=(config.blocks,),
        cluster_names=("block",),
        # Lane semantics: layouts stay as declared. No barriers around stores: a CUDA thread reads
        # what it wrote itself, or what was posted before a `sync`.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
        kernel_name=name,
    )(*operands)
    return outputs[:-1]
