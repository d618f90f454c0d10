"""Product of few tokens with a weight on Hopper, at the speed at which the weight can be read.

The weight's rows are the rows of the wgmma and the tokens its columns, of which there may be as few
as 8: so hardly anything is padded. A thread block takes a tile of outputs; one warpgroup brings
the weight and the tokens in by TMA, the others multiply. Where tiles are too few to occupy the
memory system, the thread blocks of a cluster share a tile: each takes a part of the contracted
dimension, writes its sums to global memory, and adds up all of them for a part of the tokens.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels import cluster

ROWS = 64  # of the weight in one wgmma
MAX_TOKENS = 256  # of one wgmma
MAX_SUMS = 192  # float32 sums that a thread may hold in its 255 registers
THREADS = 128  # of a warpgroup
MAX_CLUSTER = 8  # thread blocks, on any Hopper GPU
SMS = 132
SMEM_BYTES = 227 * 1024  # of a multiprocessor, for thread blocks; each takes 1 KB more


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        outputs: of a thread block; of a SwiGLU pair, of its result.
        depth: of the contracted dimension, multiplied in one step.
        stages: steps that are in shared memory or on their way.
        splits: thread blocks of a cluster that share the contracted dimension.
        multicast: thread blocks of a cluster that get the same tokens by one copy.
        warpgroups: of a thread block that multiply; they share its outputs.
    """

    outputs: int
    depth: int
    stages: int
    splits: int = 1
    multicast: int = 1
    warpgroups: int = 1

    def __post_init__(self):
        if self.warpgroups < 1 or self.outputs < 1 or self.outputs % (ROWS * self.warpgroups):
            raise ValueError(
                f"{self.outputs=} must be a positive multiple of {ROWS} for each of "
                f"{self.warpgroups=}"
            )
        if self.depth not in (64, 128, 256):
            raise ValueError(f"{self.depth=} must be 64, 128 or 256")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")
        if self.splits < 1 or self.multicast < 1 or self.splits * self.multicast > MAX_CLUSTER:
            raise ValueError(f"{self.splits=} times {self.multicast=} must be 1 to {MAX_CLUSTER}")

    @property
    def rows(self) -> int:
        """Outputs of a warpgroup."""
        return self.outputs // self.warpgroups


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a product.

    Attributes:
        tokens: T.
        inputs: K.
        shards: weights side by side.
        parts: 2 if each is a SwiGLU pair, else 1.
        outputs: of a shard; of a SwiGLU pair, of its result.
        inputs_first: how the weight is stored.
    """

    tokens: int
    inputs: int
    shards: int
    parts: int
    outputs: int
    inputs_first: bool

    @classmethod
    def of(cls, x, weight, gated: bool, inputs_first: bool) -> "Problem":
        """Return the sizes of the arguments of `op.linear`."""
        tokens, inputs = x.shape
        shards, parts = weight.shape[:2] if gated else (1, 1)
        outputs = math.prod(weight.shape) // (inputs * shards * parts)
        return cls(tokens, inputs, shards, parts, outputs, inputs_first)

    @property
    def columns(self) -> int:
        """Tokens of the wgmma."""
        return _up(self.tokens, 8)

    def refuses(self, config: Config) -> str | None:
        """Return why the kernel cannot run with these sizes, or `None` if it can."""
        if self.outputs % config.outputs or (
            self.shards * self.outputs // config.outputs % config.multicast
        ):
            return f"{self.outputs} outputs are not divided by {config}"
        if self.inputs % config.depth or self.inputs < config.depth * config.splits:
            return f"{self.inputs} inputs are not divided by {config}"
        if config.multicast > 1 and self.columns % (8 * config.multicast):
            return f"the copies of {self.columns} tokens are not divided by {config}"
        if self.parts * config.rows * self.columns > MAX_SUMS * THREADS:
            return f"the sums of {self.columns} tokens are too many for the registers of {config}"
        if (size := self.smem_bytes(config)) > SMEM_BYTES:
            return f"{config} takes {size} bytes of shared memory, more than {SMEM_BYTES}"
        return None

    def stage_bytes(self, config: Config) -> int:
        """Return the shared memory of one stage."""
        return 2 * (self.parts * config.outputs + self.columns) * config.depth

    def smem_bytes(self, config: Config) -> int:
        """Return the shared memory of a thread block, but for a few barriers."""
        out = 2 * config.outputs * self.share(config)
        return config.stages * self.stage_bytes(config) + out

    def most_stages(self, config: Config, resident: int) -> int:
        """Return how many stages fit when a multiprocessor holds `resident` thread blocks."""
        room = SMEM_BYTES // resident - 1024 - 2 * config.outputs * self.share(config)
        return min(room // self.stage_bytes(config), self.inputs // config.depth // config.splits)

    def share(self, config: Config) -> int:
        """Return for how many tokens each block of a split tile adds up the sums."""
        return _up(-(-self.columns // config.splits), 8)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def at_once(cluster: int) -> int:
    """Return how many thread blocks in clusters of this size surely run at once, one to an SM.

    The blocks of a cluster share a GPC, whose 14 to 18 SMs fours do not fill: 128 blocks in fours
    took a third longer than in pairs.
    """
    return SMS if cluster <= 2 else SMS * 9 // 10


def choose_config(problem: Problem) -> Config | None:
    """Return the sizes for a product, or `None` if there are none.

    What was fastest on an H200 for the products of Llama-3.1-8B with 64 tokens: tiles of one wgmma,
    each shared by a cluster as long as all run at once, and shared memory full of stages. Every
    tile reads all the tokens, of which 64 are as much as its weight; so where no tile is shared,
    the blocks of four SMs get them by one copy.
    """
    if problem.outputs % ROWS:
        return None
    tiles = problem.shards * problem.outputs // ROWS
    for depth in (128, 64):
        splits = max(
            (n for n in (2, 4, 8) if n * tiles <= at_once(n) and n * depth <= problem.inputs),
            default=1,
        )
        resident = min(-(-tiles * splits // SMS), 2)
        copies = [1]
        if splits == 1 and problem.columns >= 32:
            copies += [n for n in (2, 4) if n * resident <= 4]
        for multicast in reversed(copies):
            config = Config(ROWS, depth, 2, splits, multicast)
            stages = problem.most_stages(config, resident)
            config = dataclasses.replace(config, stages=max(stages, 2))
            if (stages > 2 or depth == 64) and not problem.refuses(config):
                return config
    return None


def unsupported(
    x: jax.ShapeDtypeStruct,
    weight: jax.ShapeDtypeStruct,
    bias: jax.ShapeDtypeStruct | None,
    gated: bool,
    inputs_first: bool,
) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"tokens are {x.dtype}, the weight is {weight.dtype}, {bias=}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{x.dtype} is not a 16-bit float"
    problem = Problem.of(x, weight, gated, inputs_first)
    if not 0 < problem.tokens <= MAX_TOKENS:
        return f"{problem.tokens} tokens are not 1 to {MAX_TOKENS}"
    return None if choose_config(problem) else f"there are no tiles for {problem}"


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("gated", "inputs_first", "config", "interpret"))
def linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    gated: bool = False,
    inputs_first: bool = False,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.linear`.

    Raises:
        ValueError: the shapes do not fit `config`.
    """
    problem = Problem.of(x, weight, gated, inputs_first)
    config = config or choose_config(problem)
    if config is None:
        raise ValueError(f"there are no tiles for {problem}")
    if reason := problem.refuses(config):
        raise ValueError(reason)
    T, dtype = problem.tokens, x.dtype
    matrices = problem.shards, problem.parts, problem.outputs
    tiles = problem.shards * problem.outputs // config.outputs
    rows, share = config.rows, problem.share(config)
    # One tile of 8 tokens may pass the end, where TMA reads zeros and writes nothing.
    rows_of_x = T if T < 8 else problem.columns

    out_type = [jax.ShapeDtypeStruct((rows_of_x, problem.shards * problem.outputs), dtype)]
    if config.splits > 1:
        sums = problem.parts * rows, config.splits * share
        out_type.append(
            jax.ShapeDtypeStruct((config.splits, tiles, config.warpgroups, *sums), jnp.float32)
        )
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    weight_tile = (config.depth, rows) if inputs_first else (problem.parts * rows, config.depth)
    consumed = functools.partial(plgpu.ClusterBarrier, collective_axes=("neighbour",))
    if config.multicast == 1:
        consumed = plgpu.Barrier
    out, *_ = plgpu.kernel(
        functools.partial(_body, problem=problem, config=config, has_bias=bias is not None),
        out_type=out_type,
        scratch_types={
            "x_smem": plgpu.SMEM(
                (config.stages, problem.columns, config.depth), dtype, transforms=swizzled
            ),
            "weight_smem": plgpu.SMEM(
                (config.stages, config.warpgroups, *weight_tile), dtype, transforms=swizzled
            ),
            "out_smem": plgpu.SMEM((config.warpgroups, share, rows), dtype, transforms=swizzled),
            "loaded": plgpu.Barrier(
                num_arrivals=1 + problem.parts * config.warpgroups, num_barriers=config.stages
            ),
            "consumed": consumed(num_arrivals=config.warpgroups, num_barriers=config.stages),
            "written": cluster.barrier("split", interpret, config.warpgroups + 1)
            if config.splits > 1
            else None,
        },
        grid=(tiles // config.multicast,),
        grid_names=("tiles",),
        cluster=(config.multicast, config.splits),
        cluster_names=("neighbour", "split"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="linear",
    )(
        jnp.pad(x, ((0, rows_of_x - T), (0, 0))),
        weight if inputs_first else weight.reshape(*matrices, problem.inputs),
        *([] if bias is None else [bias.reshape(matrices)]),
    )
    return out[:T]


def _body(
    x_gmem,  # [tokens, K], the tokens a multiple of 8 or fewer than 8
    weight_gmem,  # [shards, parts, F, K] or [K, N]
    *more_gmem,  # [shards, parts, F], the bias if there is one; then the result, [tokens, shards *
    # F]; then the sums of split tiles, [splits, tiles, warpgroups, parts * rows, splits * share]
    problem: Problem,
    config: Config,
    has_bias: bool,
    x_smem,  # [stages, columns, depth]
    weight_smem,  # [stages, warpgroups, parts * rows, depth] or [stages, warpgroups, depth, rows]
    out_smem,  # [warpgroups, share, rows]
    loaded,
    consumed,
    written,
):
    bias_gmem, (out_gmem, *sums_gmem) = more_gmem[:has_bias], more_gmem[has_bias:]
    parts, rows, stages, splits = problem.parts, config.rows, config.stages, config.splits
    warpgroup, split = lax.axis_index("warpgroup"), lax.axis_index("split")
    tile = lax.axis_index("tiles") * config.multicast + lax.axis_index("neighbour")
    tiles_of_shard = problem.outputs // config.outputs
    shard, first = lax.div(tile, tiles_of_shard), lax.rem(tile, tiles_of_shard) * config.outputs

    share = out_smem.shape[1]
    token = split * share
    all_steps = problem.inputs // config.depth
    begin = lax.div(split * all_steps, splits)
    steps = lax.div((split + 1) * all_steps, splits) - begin

    # Not static: a static slice may not pass the end.
    all_tokens = pl.ds(0 * split, problem.columns)

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    def load():
        @pl.loop(0, steps)
        def _(step):
            slot = slot_of(step)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
            inputs = pl.ds((begin + step) * config.depth, config.depth)
            plgpu.copy_gmem_to_smem(
                x_gmem.at[all_tokens, inputs],
                x_smem.at[slot],
                loaded.at[slot],
                collective_axes="neighbour" if config.multicast > 1 else None,
            )
            for i in range(config.warpgroups):
                outputs = pl.ds(first + i * rows, rows)
                for part in range(parts):
                    if problem.inputs_first:
                        source, target = weight_gmem.at[inputs, outputs], weight_smem.at[slot, i]
                    else:
                        source = weight_gmem.at[shard, part, outputs, inputs]
                        target = weight_smem.at[slot, i, pl.ds(part * rows, rows)]
                    plgpu.copy_gmem_to_smem(source, target, loaded.at[slot])

        # A thread block must not end while others of its cluster refer to its barriers.
        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(consumed.at[slot_of(step)])

    def multiply(acc):
        @pl.loop(0, steps)
        def _(step):
            slot = slot_of(step)
            plgpu.barrier_wait(loaded.at[slot])
            rows_smem = weight_smem.at[slot, warpgroup]
            rows_smem = rows_smem.T if problem.inputs_first else rows_smem
            plgpu.wgmma(acc, rows_smem, x_smem.at[slot].T)
            plgpu.wgmma_wait(1)  # the step before is done, and its memory free
            pl.when(step > 0)(lambda: plgpu.barrier_arrive(consumed.at[slot_of(step - 1)]))

        sums = acc[...]
        plgpu.barrier_arrive(consumed.at[slot_of(steps - 1)])
        return sums

    def store(sums):
        """Store the outputs of this block's share of the tokens, from `[parts * rows, share]`."""
        products = [sums[i * rows : (i + 1) * rows] for i in range(parts)]
        mine = pl.ds(first + warpgroup * rows, rows)
        if bias_gmem:
            by_row = plgpu.Layout.WGMMA.reduce(1)
            for i in range(parts):
                bias = plgpu.load(bias_gmem[0].at[shard, i, mine], layout=by_row, optimized=False)
                bias = bias.astype(jnp.float32)
                products[i] += lax.broadcast_in_dim(bias, products[i].shape, [0])
        if parts == 1:
            (out,) = products
        else:
            gate, up = products
            out = gate / (1 + jnp.exp(-gate)) * up
        out_smem.at[warpgroup].T[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        columns = pl.ds(shard * problem.outputs + first + warpgroup * rows, rows)
        plgpu.copy_smem_to_gmem(
            out_smem.at[warpgroup],
            out_gmem.at[pl.ds(token, share), columns],
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == config.warpgroups)
    def _():
        load()

    @pl.when(warpgroup < config.warpgroups)
    def _():
        sums = pl.run_scoped(multiply, plgpu.ACC((parts * rows, problem.columns)))
        if splits == 1:
            store(sums)
        else:
            mine = sums_gmem[0].at[split, tile, warpgroup]
            mine[:, pl.ds(0, problem.columns)] = sums

    if splits > 1:
        cluster.wait(written)

        @pl.when((warpgroup < config.warpgroups) & (token < problem.columns))
        def _():
            sums = [
                plgpu.load(
                    sums_gmem[0].at[i, tile, warpgroup, :, pl.ds(token, share)],
                    layout=plgpu.Layout.WGMMA,
                    optimized=False,
                )
                for i in range(splits)
            ]
            store(functools.reduce(jnp.add, sums))
