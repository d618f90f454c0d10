"""Product of one token with a weight `[K, N]` on Hopper, at the speed at which it can be read.

Nothing is multiplied by tensor cores: every thread holds some columns, and adds up rows of them,
those of the next step always under way. Tall and narrow pieces of the weight go to the thread
blocks of a cluster, which split its rows; the first of them adds up what all have found.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels import cluster

BLOCKS = 2 * 132  # two thread blocks a multiprocessor
THREADS, WARPS, LANES = 128, 4, 32  # of a thread block
VECTOR = 8  # 16-bit numbers that a thread loads at once
MOST_LOADS = 16  # of a thread in one step; those of two steps have to fit into its registers


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        columns: of a thread block.
        splits: thread blocks of a cluster, which share the rows.
        loads: of a thread in one step.
    """

    columns: int
    splits: int
    loads: int

    @property
    def rows(self) -> int:
        """Rows that a thread block loads at once."""
        return THREADS * VECTOR // self.columns

    @property
    def layout(self) -> Any:
        """How `[rows, columns]` lie in registers: columns divided among warps, rows among lanes."""
        tiles = (self.rows, self.columns), (self.columns // WARPS,), (VECTOR,)
        return plgpu.Layout.TILED(
            plgpu.Tiling(tiles), warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1
        )


def choose_config(K: int, N: int) -> Config | None:
    """Return sizes that occupy the chip once with equal thread blocks, or `None`."""
    found = []
    for columns in (256, 128, 64):
        rows = THREADS * VECTOR // columns
        for splits in (8, 4, 2, 1):
            blocks = N // columns * splits
            if N % columns or K % (splits * rows) or blocks > BLOCKS:
                continue
            loads = K // (splits * rows)
            step = max(n for n in range(1, MOST_LOADS + 1) if loads % n == 0)
            found.append((blocks, Config(columns, splits, step)))
    return max(found, key=lambda item: item[0])[1] if found else None


def takes(x: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct) -> bool:
    """Return whether `linear_of_one` can multiply `x [T, K]` by `weight [K, N]`."""
    is_16_bit = x.dtype == weight.dtype and x.dtype in (jnp.bfloat16, jnp.float16)
    return x.shape[0] == 1 and is_16_bit and choose_config(*weight.shape) is not None


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def linear_of_one(
    x: Array,
    weight: Array,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """`x [1, K]` times `weight [K, N]`, if it `takes` them; sums are float32."""
    K, N = weight.shape
    config = config or choose_config(K, N)
    assert config is not None, weight.shape
    out, _ = plgpu.kernel(
        functools.partial(_body, config=config, on_gpu=interpret is None),
        out_type=[
            jax.ShapeDtypeStruct((1, N), x.dtype),
            jax.ShapeDtypeStruct((config.splits, N), jnp.float32),
        ],
        scratch_types={
            "written": cluster.barrier("split", interpret) if config.splits > 1 else None
        },
        grid=(N // config.columns,),
        grid_names=("tile",),
        cluster=(config.splits,),
        cluster_names=("split",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # takes layouts as they are given
        ),
        interpret=interpret,
        kernel_name="matvec",
    )(x, weight)
    return out


def _body(
    x_gmem,  # [1, K]
    weight_gmem,  # [K, N]
    out_gmem,  # [1, N]
    sums_gmem,  # [splits, N], float32
    *,
    config: Config,
    on_gpu: bool,
    written,
):
    tile, split = lax.axis_index("tile"), lax.axis_index("split")
    layout, rows = config.layout, config.rows
    by_column, by_row = layout.reduce(0), layout.reduce(1)
    load = functools.partial(plgpu.load, optimized=False)
    mine = pl.ds(tile * config.columns, config.columns)
    rows_of_split = weight_gmem.shape[0] // config.splits
    steps = rows_of_split // (config.loads * rows)

    def fetch(step):
        first = split * rows_of_split + step * config.loads * rows
        some = [pl.ds(first + i * rows, rows) for i in range(config.loads)]
        weights = [load(weight_gmem.at[these, mine], layout=layout) for these in some]
        return weights, [load(x_gmem.at[0, these], layout=by_row) for these in some]

    def add(sums, weights, inputs):
        for weight, x in zip(weights, inputs, strict=True):
            x = lax.broadcast_in_dim(x.astype(jnp.float32), weight.shape, [0])
            x = plgpu.layout_cast(x, layout)  # right behind it, as the lowering looks for it
            sums += weight.astype(jnp.float32) * x
        return sums

    def fetch_and_add(step, carry):
        sums, loaded = carry
        following = fetch(step + 1)
        sums = add(sums, *loaded)
        if on_gpu:
            _keep_loads_early()
        return sums, following

    zeros = plgpu.layout_cast(jnp.zeros((rows, config.columns), jnp.float32), layout)
    sums, last = lax.fori_loop(0, steps - 1, fetch_and_add, (zeros, fetch(0)))
    sums = add(sums, *last)
    total = jnp.sum(sums, axis=0)
    if config.splits > 1:
        sums_gmem[split, mine] = total
        cluster.wait(written)

    @pl.when(split == 0)
    def _():
        out = total
        if config.splits > 1:
            parts = [load(sums_gmem.at[i, mine], layout=by_column) for i in range(config.splits)]
            out = functools.reduce(jnp.add, parts)
        out_gmem[0, mine] = out.astype(out_gmem.dtype)


def _keep_loads_early() -> None:
    """Have LLVM leave what was loaded for the next step where it is, not load it there."""

    @plgpu.inline_mgpu()
    def nothing(_) -> None:
        inline_ptx("", has_side_effects=True)

    nothing()
