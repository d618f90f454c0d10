"""A row of logits in the shared memory of a thread block cluster; device code of several kernels.

One thread block reads from memory too slowly for a row of 128,256 logits, and has no room for it.
So the blocks of a cluster hold a share each, pass over it as often as they need, and tell each
other what they found through a board in global memory.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 512  # entries that a thread block works on at once: 4 a thread
MAX_BLOCKS = 8  # of a cluster on any Hopper GPU
SMEM_BYTES = 224 * 1024  # for the share of one thread block
WORDS = 8  # of one message; 32 bytes, so that two messages share no sector of the L1 cache


@dataclasses.dataclass(frozen=True)
class Config:
    """How a row is spread.

    Attributes:
        blocks: thread blocks of a cluster.
        tiles: of `TILE` entries, in each.
        unroll: tiles that are on their way from global memory at once.
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
        barrier: of the cluster.
        vocab: entries of a row.
        width: entries of a row in global memory, at least `TILE`.
        fences: whether the memory model needs them; the interpreter's has none.
    """

    def __init__(
        self, smem, board, barrier, *, vocab: int, width: int, config: Config, fences: bool
    ) -> None:
        self.index, self.block = lax.axis_index("row"), lax.axis_index("block")
        self._smem, self._board, self._barrier = smem, board, barrier
        self.vocab, self.blocks, self.unroll = vocab, config.blocks, config.unroll
        self._width = width
        self._config, self._fences = config, fences
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

    def fold(self, step: Callable, initial, together: int = 1):
        """Return `step(tiles, carry)` over all tiles, a list of `together` of them at a time."""

        def several(i, carry):
            return step([i * together + j for j in range(together)], carry)

        return lax.fori_loop(0, self._config.tiles // together, several, initial)

    def load(self, gmem) -> Array:
        """Bring the row in from `gmem [R, width]`; return how many entries are not finite."""

        def step(tiles, damaged):
            fetched = [self.fetch(gmem, self.index, tile) for tile in tiles]  # all on their way
            for tile, x in zip(tiles, fetched, strict=True):
                self[tile] = self.where_present(tile, x, -jnp.inf)
                x = self.where_present(tile, x, 0.0)
                damaged += 1 - (jnp.abs(x) < jnp.inf).astype(jnp.int32)
            return damaged

        return self.fold(step, self.full(0), self.unroll).sum()

    def argmax(self) -> tuple[Array, Array]:
        """Return the largest entry of this block's share, and the first position that has it."""

        def step(tiles, carry):
            best, tile_of_best = carry
            x = self[tiles[0]]
            better = x > best
            return (
                jnp.where(better, x, best),
                jnp.where(better, self.full(tiles[0]), tile_of_best),
            )

        best, tile_of_best = self.fold(step, (self.full(-jnp.inf), self.full(0)))
        lane = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=self._layout)
        value = best.max()
        start = jnp.minimum(self._nominal(0) + tile_of_best * TILE, self._width - TILE)
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
            self._fence()
            plgpu.barrier_arrive(self._barrier)
            plgpu.barrier_wait(self._barrier)
            self._fence()

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

    def best(self, turn: Array | int, value: Array, position: Array) -> tuple[Array, Array]:
        """Return the largest `value` of the cluster and its position; the first of equals."""
        best, first = largest(*self.exchange(turn, value, position.astype(jnp.float32)))
        return best, first.astype(jnp.int32)

    def _nominal(self, tile: Array | int) -> Array:
        return (self.block * self._config.tiles + tile) * TILE

    def _start(self, tile: Array | int) -> Array:
        return jnp.minimum(self._nominal(tile), self._width - TILE)

    def _fence(self) -> None:
        """Make what any block of the cluster wrote before a barrier visible after it."""
        if self._fences:

            @plgpu.inline_mgpu()
            def fence(_):
                inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)

            fence()


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
            fences=interpret is None,
        )
        body(row, *refs)

    outputs = plgpu.kernel(
        kernel,
        out_type=[*out_type, board],
        scratch_types={
            "smem": plgpu.SMEM((config.tiles, TILE), jnp.float32),
            "barrier": plgpu.ClusterBarrier(collective_axes=("block",)),
        },
        grid=(R,),
        grid_names=("row",),
        cluster=(config.blocks,),
        cluster_names=("block",),
        # Lane semantics: layouts stay as declared.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name=name,
    )(*operands)
    return outputs[:-1]
