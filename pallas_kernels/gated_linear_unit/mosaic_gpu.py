"""Gated linear unit for many tokens on Hopper: two matrix products and the gate in one kernel.

A pair of thread blocks (a cluster) works on tiles of 256 tokens by 128 columns, one after another.
Each has half of the tokens; the weights, gate and up below each other as one operand of 256 rows,
are read once for both and sent to both. One warpgroup loads, without pause from tile to tile; two
multiply, 64 tokens each, so that a thread holds the gate and the up of the same elements and the
activation needs no exchange. The result leaves by TMA while the next tile is multiplied.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # tokens of one warpgroup, the M of one wgmma
COLUMNS = 128  # of the result in one tile; with gate and up the 256 that a wgmma has at most
DEPTH = 64  # of one step along K: 128 bytes, the widest swizzle
PRODUCER = 2  # index of the warpgroup that loads
CLUSTER = 2  # thread blocks that share the weights' tiles
TOKENS = CLUSTER * PRODUCER * ROWS  # of a cluster's tile
SMS = 132


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        stages: steps along K that are in shared memory or on their way.
        panel: tiles of tokens that are worked on with the same weights at about the same time: what
            all multiprocessors read together should stay in the L2 cache.
    """

    stages: int = 4
    panel: int = 8

    def __post_init__(self):
        if self.stages < 2 or self.panel < 1:
            raise ValueError(f"{self.stages=} must be at least 2, {self.panel=} at least 1")


def unsupported(x: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    (T, K), F = x.shape, weight.shape[2]
    if x.dtype != weight.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"tokens are {x.dtype}, weights {weight.dtype}; both must be one 16-bit type"
    if T % 8 or F % COLUMNS or K % DEPTH:
        return f"{T=}, {F=}, {K=} are not multiples of 8, {COLUMNS}, {DEPTH}"
    return None


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def gated_linear_unit(
    x: Array,
    weight: Array,
    config: Config = Config(),
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.gated_linear_unit`."""
    T = x.shape[0]
    shards, _, F, _ = weight.shape
    tiles = -(-T // TOKENS) * (shards * F // COLUMNS)
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    smem = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=swizzled)
    return plgpu.kernel(
        functools.partial(_body, config=config, interpreted=interpret is not None),
        out_type=jax.ShapeDtypeStruct((T, shards * F), x.dtype),
        scratch_types={
            "x_smem": smem((config.stages, PRODUCER * ROWS, DEPTH)),
            "weight_smem": smem((config.stages, 2 * COLUMNS, DEPTH)),
            "out_smem": smem((PRODUCER, ROWS, COLUMNS)),
            "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=config.stages),
            "consumed": plgpu.ClusterBarrier(
                collective_axes=("block",), num_arrivals=PRODUCER, num_barriers=config.stages
            ),
        },
        grid=(min(SMS // CLUSTER, tiles),),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=PRODUCER + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="gated_linear_unit",
    )(x, weight)


def _body(
    x_gmem,  # [T, K]
    weight_gmem,  # [shards, 2, F, K]
    out_gmem,  # [T, shards * F]
    *,
    config: Config,
    interpreted: bool,
    x_smem,
    weight_smem,
    out_smem,
    loaded,
    consumed,
):
    (T, K), F = x_gmem.shape, weight_gmem.shape[2]
    stages, steps = config.stages, K // DEPTH
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    grid = -(-T // TOKENS), out_gmem.shape[1] // COLUMNS

    def for_each_tile(work):
        """Call `work` with a tile's first token and column and the steps done; return all steps."""

        def tile(loop: plgpu.NDLoopInfo, carry: Array) -> Array:
            tokens, columns = plgpu.planar_snake(loop.index[0], grid, 0, config.panel)
            work(tokens * TOKENS + block * (PRODUCER * ROWS), columns * COLUMNS, carry)
            return carry + steps

        tiles = (grid[0] * grid[1],)
        return plgpu.nd_loop(tiles, collective_axes="cluster", init_carry=jnp.int32(0))(tile)

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    @pl.when(warpgroup == PRODUCER)
    def _():
        if not interpreted:
            plgpu.set_max_registers(40, action="decrease")

        def load(token, column, done):
            shard, row = lax.div(column, F), lax.rem(column, F)

            @pl.loop(0, steps)
            def _(k):
                slot = slot_of(done + k)
                pl.when(done + k >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                depth = pl.ds(k * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(
                    x_gmem.at[pl.ds(token, PRODUCER * ROWS), depth],
                    x_smem.at[slot],
                    loaded.at[slot],
                )
                for i in range(2):
                    plgpu.copy_gmem_to_smem(
                        weight_gmem.at[shard, i, pl.ds(row, COLUMNS), depth],
                        weight_smem.at[slot, pl.ds(i * COLUMNS, COLUMNS)],
                        loaded.at[slot],
                        collective_axes="block",
                    )

        total = for_each_tile(load)

        # A thread block must not end while the other one may still signal to it.
        @pl.loop(jnp.maximum(total - stages, 0), total)
        def _(k):
            plgpu.barrier_wait(consumed.at[slot_of(k)])

    @pl.when(warpgroup < PRODUCER)
    def _():
        if not interpreted:
            plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(warpgroup * ROWS, ROWS)

        def multiply(token, column, done):
            def accumulate(acc):
                @pl.loop(0, steps)
                def _(k):
                    slot = slot_of(done + k)
                    plgpu.barrier_wait(loaded.at[slot])
                    weight = weight_smem.at[slot].transpose((1, 0))
                    plgpu.wgmma(acc, x_smem.at[slot, mine], weight)
                    # This step runs on while the next one is issued; the one before is through.
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(consumed.at[slot_of(done + k - 1)]))

                return acc[...]

            both = pl.run_scoped(accumulate, plgpu.ACC((ROWS, 2 * COLUMNS), jnp.float32))
            plgpu.barrier_arrive(consumed.at[slot_of(done + steps - 1)])
            gate, up = both[:, :COLUMNS], both[:, COLUMNS:]
            # The square of 1/sqrt is two instructions, a division is ten.
            root = lax.rsqrt(1 + jnp.exp(-gate))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[warpgroup] = (gate * (root * root) * up).astype(out_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup],
                out_gmem.at[pl.ds(token + warpgroup * ROWS, ROWS), pl.ds(column, COLUMNS)],
            )

        for_each_tile(multiply)
        plgpu.wait_smem_to_gmem(0)
