"""GELU of a product on Hopper: while one tile's GELU is computed, the next tile is multiplied.

There is a thread block for each multiprocessor, which takes tile after tile. One warpgroup brings
tokens and weights in by TMA, step by step through a ring of slots in shared memory; two others take
a tile in turns, all of it: while one has the tensor cores, the other adds the bias, computes GELU
and stores. That they alternate follows from the ring, whose slots hold the steps of the one's tile,
then of the other's.

Tiles of 128 x 128 would read more from the L2 cache than it gives. So tiles are larger, or two
thread blocks, a cluster, take neighbouring tiles at the same time, and get what these have in
common by one copy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels.gelu import gelu_by_polynomial

DEPTH = 64  # inputs of a step: 128 bytes, a row of the swizzle
PIECE = 64  # rows and columns that leave by one copy
CONSUMERS = 2  # warpgroups that multiply; the one after them loads
THREADS = 128  # of a warpgroup
MAX_SUMS = 192  # float32 sums that a thread can hold, of its 240 registers
SMS = 132
SMEM_BYTES = 227 * 1024  # of a thread block
BARRIER_BYTES = 1024  # at most


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        rows: tokens of a tile.
        outputs: of a tile.
        stages: steps that are in shared memory or on their way.
        shared: what the two thread blocks of a cluster have in common, "weight" if their tiles are
            one below the other, "tokens" if they are side by side; `None` for no clusters.
        pieces: of a warpgroup's result, on their way out of shared memory.
        blocks: thread blocks, at most.
    """

    rows: int
    outputs: int
    stages: int
    shared: str | None = None
    pieces: int = 2
    blocks: int = SMS

    def __post_init__(self):
        if self.rows < 1 or self.outputs < 1 or self.rows % PIECE or self.outputs % PIECE:
            raise ValueError(f"{self.rows=} and {self.outputs=} must be multiples of {PIECE}")
        if self.outputs > 256 or self.rows * self.outputs > MAX_SUMS * THREADS:
            raise ValueError(f"the sums of {self.rows=} and {self.outputs=} are too many")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")
        if self.pieces < 1 or self.rows * self.outputs % (self.pieces * PIECE * PIECE):
            raise ValueError(f"{self.pieces=} do not divide those of a tile")
        if self.shared not in (None, "weight", "tokens"):
            raise ValueError(f"{self.shared=} is neither 'weight' nor 'tokens'")
        if self.blocks < self.cluster or self.blocks % self.cluster:
            raise ValueError(f"{self.blocks=} are not clusters of {self.cluster}")
        if self.smem_bytes > SMEM_BYTES:
            raise ValueError(f"{self} takes {self.smem_bytes} bytes, more than {SMEM_BYTES}")

    @property
    def down(self) -> int:
        """Tiles of a cluster that are one below the other."""
        return 2 if self.shared == "weight" else 1

    @property
    def across(self) -> int:
        """Tiles of a cluster that are side by side."""
        return 2 if self.shared == "tokens" else 1

    @property
    def cluster(self) -> int:
        """Thread blocks of a cluster."""
        return self.down * self.across

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a thread block."""
        slots = self.stages * DEPTH * (self.rows + self.outputs)
        return 2 * (slots + CONSUMERS * self.pieces * PIECE * PIECE) + BARRIER_BYTES


CONFIGS = (
    Config(128, 192, 4, "tokens"),
    Config(192, 128, 5, "tokens", pieces=1),
    Config(128, 192, 4, "weight"),
    Config(192, 128, 4, "weight"),
    Config(128, 64, 6, "weight"),
    Config(64, 64, 8, pieces=1),
)
"""Those with large tiles first, side by side in a cluster if two divide the outputs: so it was
fastest on an H200 (benchmarks/results/h200/tune_linear_gelu.json)."""


def choose_config(T: int, N: int) -> Config | None:
    """Return the sizes for `T` tokens and `N` outputs, or `None` if there are none.

    The first that divide the outputs and occupy the chip; if none do, the smallest tiles.
    """
    divided = [config for config in CONFIGS if N % (config.outputs * config.across) == 0]

    def tiles(config: Config) -> int:
        return pl.cdiv(T, config.rows) * (N // config.outputs)

    full = (config for config in divided if tiles(config) >= 0.9 * SMS)
    return next(full, divided[-1] if divided else None)


def unsupported(
    x: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct, bias: jax.ShapeDtypeStruct
) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    if not x.dtype == weight.dtype == bias.dtype:
        return f"tokens are {x.dtype}, the weight is {weight.dtype}, the bias {bias.dtype}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{x.dtype} is not a 16-bit float"
    K, N = weight.shape
    if not K or K % DEPTH:
        return f"{K} inputs are not a multiple of {DEPTH}"
    if not x.shape[0]:
        return "there are no tokens"
    return None if N and N % PIECE == 0 else f"{N} outputs are not a multiple of {PIECE}"


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def linear_gelu(
    x: Array,
    weight: Array,
    bias: Array,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.linear_gelu`.

    Raises:
        ValueError: the outputs are not divided by `config`.
    """
    (T, K), N = x.shape, weight.shape[1]
    if config is None:
        config = choose_config(T, N)
        if config and interpret:  # few, so that they have several tiles there, too
            config = dataclasses.replace(config, blocks=2)
    if config is None or N % (config.outputs * config.across) or K % DEPTH:
        raise ValueError(f"{K} inputs and {N} outputs are not divided by {config}")
    # TMA reads zeros past the end, and writes nothing, but of whole tiles of eight rows.
    padded = max(T + -T % 8, config.rows)
    turns = pl.cdiv(padded, config.rows * config.down) * (N // (config.outputs * config.across))

    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    consumed = plgpu.Barrier
    if config.cluster > 1:
        consumed = functools.partial(plgpu.ClusterBarrier, collective_axes=("neighbour",))
    out = plgpu.kernel(
        functools.partial(_body, config=config, interpreted=interpret is not None),
        out_type=jax.ShapeDtypeStruct((padded, N), x.dtype),
        scratch_types={
            "x_smem": plgpu.SMEM((config.stages, config.rows, DEPTH), x.dtype, transforms=swizzled),
            "weight_smem": plgpu.SMEM(
                (config.stages, DEPTH, config.outputs), x.dtype, transforms=swizzled
            ),
            "out_smem": plgpu.SMEM(
                (CONSUMERS, config.pieces, PIECE, PIECE), x.dtype, transforms=swizzled
            ),
            # Of each slot one for either consumer: who waits for a barrier must not miss a turn.
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=(CONSUMERS, config.stages)),
            "consumed": consumed(num_barriers=config.stages),
        },
        grid=(min(config.blocks // config.cluster, turns),),
        grid_names=("cluster",),
        cluster=(config.cluster,),
        cluster_names=("neighbour",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="linear_gelu",
    )(jnp.pad(x, ((0, padded - T), (0, 0))), weight, bias)
    return out[:T]


def _body(
    x_gmem,  # [T, K], T a multiple of 8 and at least rows
    weight_gmem,  # [K, N]
    bias_gmem,  # [N]
    out_gmem,  # [T, N]
    *,
    config: Config,
    interpreted: bool,
    x_smem,  # [stages, rows, DEPTH]
    weight_smem,  # [stages, DEPTH, outputs]
    out_smem,  # [CONSUMERS, pieces, PIECE, PIECE]
    loaded,  # [CONSUMERS, stages]: a slot has been filled for a consumer
    consumed,  # [stages]: a slot has been read, in all thread blocks of the cluster
):
    warpgroup, neighbour = lax.axis_index("warpgroup"), lax.axis_index("neighbour")
    cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")
    (T, K), (_, N) = x_gmem.shape, weight_gmem.shape
    stages, steps = config.stages, K // DEPTH

    # A cluster's turns; in each its thread blocks take a tile each. Tiles that clusters take at the
    # same time are side by side, over all of the weight, which the L2 cache holds: so tokens are
    # read from global memory once.
    row_turns = pl.cdiv(T, config.rows * config.down)
    column_turns = N // (config.outputs * config.across)
    turns = lax.div(row_turns * column_turns - cluster + (clusters - 1), clusters)

    def corner(turn):
        """Return the first row and the first column of a turn's tile."""
        index = cluster + turn * clusters
        row, column = lax.div(index, column_turns), lax.rem(index, column_turns)
        if config.down > 1:
            row = row * config.down + neighbour
        if config.across > 1:
            column = column * config.across + neighbour
        return row * config.rows, column * config.outputs

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    def load():
        def load_tile(turn):
            row, column = corner(turn)
            consumer = lax.rem(turn, CONSUMERS)

            @pl.loop(0, steps)
            def _(i):
                step = turn * steps + i
                slot = slot_of(step)
                inputs = pl.ds(i * DEPTH, DEPTH)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(row, config.rows), inputs],
                    x_smem.at[slot],
                    loaded.at[consumer, slot],
                    collective_axes="neighbour" if config.across > 1 else None,
                )
                plgpu.copy_gmem_to_smem(
                    weight_gmem.at[inputs, pl.ds(column, config.outputs)],
                    weight_smem.at[slot],
                    loaded.at[consumer, slot],
                    collective_axes="neighbour" if config.down > 1 else None,
                )

        pl.loop(0, turns)(load_tile)

        # A thread block must not end while its neighbour refers to its barriers.
        @pl.loop(jnp.maximum(turns * steps - stages, 0), turns * steps)
        def _(step):
            plgpu.barrier_wait(consumed.at[slot_of(step)])

    def load_bias(column):
        by_column = plgpu.Layout.WGMMA.reduce(0)
        return plgpu.load(bias_gmem.at[pl.ds(column, PIECE)], layout=by_column, optimized=False)

    def multiply(turn, acc):
        """Return a tile's sums, and the bias of its first columns."""

        @pl.loop(0, steps)
        def _(i):
            slot = slot_of(turn * steps + i)
            plgpu.barrier_wait(loaded.at[warpgroup, slot])
            plgpu.wgmma(acc, x_smem.at[slot], weight_smem.at[slot])
            plgpu.wgmma_wait(1)  # the step before is done, and its memory free
            pl.when(i > 0)(lambda: plgpu.barrier_arrive(consumed.at[slot_of(turn * steps + i - 1)]))

        bias = load_bias(corner(turn)[1])  # while the last step is multiplied
        sums = acc[...]
        plgpu.barrier_arrive(consumed.at[slot_of(turn * steps + steps - 1)])
        return sums, bias

    def store(turn, sums, bias):
        """Store GELU of a tile, piece by piece.

        The condition, which saves work past the end of the tokens, has a second use: without it
        the compiler computes all pieces before it stores the first, and runs out of registers.
        """
        row, column = corner(turn)
        index = 0
        for j in range(0, config.outputs, PIECE):
            last = j + PIECE == config.outputs
            following = bias if last else load_bias(column + j + PIECE)
            for i in range(0, config.rows, PIECE):
                target = out_smem.at[warpgroup, index % config.pieces]

                @pl.when(row + i < T)
                def _(i=i, j=j, bias=bias, target=target):
                    piece = sums[i : i + PIECE, j : j + PIECE]
                    piece += lax.broadcast_in_dim(bias.astype(jnp.float32), piece.shape, [1])
                    result = gelu_by_polynomial(piece).astype(out_smem.dtype)
                    # The copy of what was there before has to be done.
                    plgpu.wait_smem_to_gmem(config.pieces - 1, wait_read_only=True)
                    target[...] = result
                    plgpu.commit_smem()

                # In any case, since copies are counted: past the end it writes nothing.
                plgpu.copy_smem_to_gmem(
                    target, out_gmem.at[pl.ds(row + i, PIECE), pl.ds(column + j, PIECE)]
                )
                index += 1
            bias = following

    def take_turns():
        @pl.loop(0, lax.div(turns - warpgroup + (CONSUMERS - 1), CONSUMERS))
        def _(i):
            turn = i * CONSUMERS + warpgroup
            sums, bias = pl.run_scoped(
                functools.partial(multiply, turn),
                plgpu.ACC((config.rows, config.outputs)),
            )
            store(turn, sums, bias)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        if not interpreted:
            plgpu.set_max_registers(40, action="decrease")
        load()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        if not interpreted:
            plgpu.set_max_registers(232, action="increase")
        take_turns()
