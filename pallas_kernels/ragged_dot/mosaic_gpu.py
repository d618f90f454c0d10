"""Grouped product on Hopper: a thread block a tile of rows of one group.

Which tiles there are is known on the device only, so a list of them is made before the kernel, as
long as it can ever be; blocks without a tile end at once, and the matrix of a group without rows is
never read. A tile that two groups share is computed for each, and each stores its own rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    Attributes:
        rows: of a tile.
        outputs: of a tile.
        depth: of the contracted dimension, multiplied in one step.
        stages: steps that are in shared memory or on their way.
    """

    rows: int
    outputs: int
    depth: int = 64
    stages: int = 4

    def __post_init__(self):
        if self.rows not in (64, 128) or self.outputs not in (64, 128):
            raise ValueError(f"{self.rows=} and {self.outputs=} must be 64 or 128")


def choose_config(M: int, G: int, N: int) -> Config:
    """Return large tiles where groups fill them, small ones, so more of them, where they do not."""
    return Config(128, 128) if M >= 128 * G and N % 128 == 0 else Config(64, 64)


def unsupported(rows: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    if rows.dtype != weight.dtype:
        return f"rows are {rows.dtype}, the weight is {weight.dtype}"
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{rows.dtype} is not a 16-bit float"
    _, N, K = weight.shape
    if N % 64 or K % 64:
        return f"matrices of {N} x {K} are no multiples of 64"
    return None


def tiles_of_groups(group_sizes: Array, M: int, rows: int) -> Array:
    """List the tiles of `rows` rows of an `[M, K]` array that the groups touch.

    Returns:
        `[4, tiles]` int32: group, tile, first row and number of rows (0 where there is no tile).
    """
    (G,) = group_sizes.shape
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    first = starts // rows
    touched = jnp.where(group_sizes > 0, (ends - 1) // rows - first + 1, 0)
    item_ends = jnp.cumsum(touched)
    # A tile more for each group that begins within one.
    item = jnp.arange(-(-M // rows) + min(G, M) - 1)
    owner = jnp.searchsorted(item_ends, item, side="right", method="compare_all")  # without a loop
    group = jnp.minimum(owner, G - 1)
    tile = first[group] + item - (item_ends - touched)[group]
    low = jnp.maximum(starts[group], tile * rows)
    count = jnp.minimum(ends[group], (tile + 1) * rows) - low
    exists = owner < G
    return jnp.where(exists, jnp.stack([group, tile, low, count]), 0).astype(jnp.int32)


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def ragged_dot(
    rows: Array,
    weight: Array,
    group_sizes: Array,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.ragged_dot`."""
    (M, _), (G, N, _) = rows.shape, weight.shape
    config = config or choose_config(M, G, N)
    work = tiles_of_groups(group_sizes, M, config.rows)
    return plgpu.kernel(
        functools.partial(_body, config=config),
        out_type=jax.ShapeDtypeStruct((M, N), rows.dtype),
        scratch_types={"out_smem": plgpu.SMEM((config.rows, config.outputs), rows.dtype)},
        # The last one varies fastest: neighbours share a matrix, and often the rows of it.
        grid=(work.shape[1], N // config.outputs),
        grid_names=("item", "output"),
        interpret=interpret,
        kernel_name="ragged_dot",
    )(work, jnp.pad(rows, ((0, -M % config.rows), (0, 0))), weight)


def _body(
    work_gmem,  # [4, items]
    rows_gmem,  # [M rounded up, K]
    weight_gmem,  # [G, N, K]
    out_gmem,  # [M, N]
    *,
    config: Config,
    out_smem,  # [rows, outputs] of a tile
):
    item, output = lax.axis_index("item"), lax.axis_index("output")
    group, tile, low, count = (work_gmem[i, item] for i in range(4))

    @pl.when(count > 0)
    def _():
        def accumulate(acc):
            def multiply(_, rows_smem, weight_smem):
                plgpu.wgmma(acc, rows_smem, weight_smem.T)
                plgpu.wgmma_wait(1)  # the step before is done, and its memory free

            plgpu.emit_pipeline(
                multiply,
                grid=(rows_gmem.shape[1] // config.depth,),
                in_specs=[
                    plgpu.BlockSpec(shape, index, delay_release=1)
                    for shape, index in (
                        ((config.rows, config.depth), lambda k: (tile, k)),
                        ((config.outputs, config.depth), lambda k: (output, k)),
                    )
                ],
                max_concurrent_steps=config.stages,
            )(rows_gmem, weight_gmem.at[group])
            return acc[...]

        acc = pl.run_scoped(accumulate, plgpu.ACC((config.rows, config.outputs)))
        out_smem[...] = acc.astype(out_smem.dtype)
        plgpu.commit_smem()
        # A copy has a static size: one for each power of two in the number of rows.
        most = min(config.rows, out_gmem.shape[0])
        size, stored = 1 << (most.bit_length() - 1), 0
        while size:

            @pl.when((count & size) != 0)
            def _(size=size, stored=stored):
                begin = low + stored
                plgpu.copy_smem_to_gmem(
                    out_smem.at[pl.ds(begin - tile * config.rows, size)],
                    out_gmem.at[pl.ds(begin, size), pl.ds(output * config.outputs, config.outputs)],
                )

            stored += count & size
            size //= 2
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
