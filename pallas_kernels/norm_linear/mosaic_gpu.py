"""Residual addition, RMSNorm and matrix product on Hopper; for one token all in one kernel.

One token's product only streams the weights through, so all that happens between two products is
time in which the memory system rests. Here the first weights are on their way before the norm is
begun, which every thread block does for itself; then each multiplies rows of the weight, those of
the next step always under way. With more tokens the kernel of `add_rms_norm` goes before the
product of `linear`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels.add_rms_norm import mosaic_gpu as norm
from arctic_jax.pallas_kernels.linear import linear

BLOCKS = 2 * 132  # two thread blocks a multiprocessor
STEP = 16384  # elements of the weight that a thread block multiplies at once
WARPS, LANES = 4, 32  # of a thread block


def unsupported(
    x: jax.ShapeDtypeStruct,
    delta: jax.ShapeDtypeStruct,
    norm_weight: jax.ShapeDtypeStruct,
    weight: jax.ShapeDtypeStruct,
) -> str | None:
    """Return why these kernels do not take the shapes, or `None` if they do."""
    if weight.dtype != x.dtype:
        return f"tokens are {x.dtype}, the weight is {weight.dtype}"
    return norm.unsupported(x, delta, norm_weight)


def rows_of_step(K: int, F: int, parts: int, shards: int) -> int:
    """Return how many of F rows, each in `parts` matrices, a thread block multiplies at once.

    0 if the rows do not fit `rows_layout`, or results cannot be stored in pairs.
    """
    rows = [2**i for i in range(1, 7) if F % 2**i == 0 and 2**i * parts * K <= STEP]
    if K % (2 * WARPS * LANES) == 0:
        return max(rows, default=0)
    if K % (2 * LANES):
        return 0
    # Rows are short: as few at once as occupy the chip, a pair of them for each warp.
    rows = [n for n in rows if n % (2 * WARPS) == 0]
    return next((n for n in rows if shards * F // n <= BLOCKS), max(rows, default=0))


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("epsilon", "gated", "interpret"))
def norm_linear(
    x: Array,
    delta: Array,
    norm_weight: Array,
    weight: Array,
    bias: Array | None,
    epsilon: float,
    gated: bool,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, Array]:
    """See `op.norm_linear`."""
    tokens, K = x.shape
    matrices = weight if gated else weight.reshape(1, 1, -1, K)
    shards, parts, F, _ = matrices.shape
    rows = rows_of_step(K, F, parts, shards)
    if tokens > 1 or bias is not None or weight.dtype.itemsize != 2 or not rows:
        x, normed = norm.add_rms_norm(x, delta, norm_weight, epsilon, interpret)
        return x, linear(normed, weight, bias, gated=gated)
    return plgpu.kernel(
        functools.partial(_body, rows=rows, epsilon=epsilon),
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((1, shards * F), x.dtype),
        ],
        grid=(min(BLOCKS, shards * F // rows),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # takes layouts as they are given
        ),
        interpret=interpret,
        kernel_name="norm_matvec",
    )(x, delta, norm_weight, matrices)


def rows_layout(K: int) -> Any:
    """Return how rows of K elements lie in registers.

    Each is divided among all the threads, or, if it is too odd for that, among those of a warp.
    """
    if K % (2 * WARPS * LANES) == 0:
        vector = next(v for v in (8, 4, 2) if K % (WARPS * LANES * v) == 0)
        tiles = (1, WARPS * LANES * vector), (LANES * vector,), (vector,)
        warps = -3
    else:
        vector = next(v for v in (8, 4, 2) if K % (LANES * v) == 0)
        tiles = (2 * WARPS, LANES * vector), (2, LANES * vector), (vector,)
        warps = -5
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(warps,), lane_dims=(-2,), vector_dim=-1
    )


def _body(
    x_gmem,  # [1, K]
    delta_gmem,  # [1, K]
    norm_weight_gmem,  # [K]
    weight_gmem,  # [shards, 1 or 2, F, K]
    sum_gmem,  # [1, K]
    out_gmem,  # [1, shards * F]
    *,
    rows: int,
    epsilon: float,
):
    shards, parts, F, K = weight_gmem.shape
    dtype, block, blocks = x_gmem.dtype, lax.axis_index("block"), lax.axis_size("block")
    steps_of_shard = F // rows
    last = shards * steps_of_shard - 1
    by_row = rows_layout(K)
    by_element = by_row.reduce(0)
    load = functools.partial(plgpu.load, optimized=False)

    def fetch(step):
        """Load the rows of a step; past the end those of the last one again, for nothing."""
        step = jnp.minimum(step, last)
        shard, first = lax.div(step, steps_of_shard), lax.rem(step, steps_of_shard) * rows
        return [
            load(weight_gmem.at[shard, part, pl.ds(first, rows)], layout=by_row)
            for part in range(parts)
        ]

    begin = fetch(block)
    x, delta = load(x_gmem.at[0], layout=by_element), load(delta_gmem.at[0], layout=by_element)
    norm_weight = load(norm_weight_gmem, layout=by_element).astype(jnp.float32)
    x = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(dtype)

    @pl.when(block == 0)
    def _():
        sum_gmem[0] = x

    x = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.sum(x * x) / K + epsilon)
    normed = ((x * scale).astype(dtype).astype(jnp.float32) * norm_weight).astype(dtype)
    normed = lax.broadcast_in_dim(normed.astype(jnp.float32), (rows, K), [1])
    normed = plgpu.layout_cast(normed, by_row)

    def multiply(i, weights):
        step = block + i * blocks
        following = fetch(step + blocks)
        products = [jnp.sum(part.astype(jnp.float32) * normed, axis=1) for part in weights]
        if parts == 1:
            (out,) = products
        else:
            gate, up = products
            out = gate / (1 + jnp.exp(-gate)) * up
        out_gmem[0, pl.ds(step * rows, rows)] = out.astype(dtype)
        return following

    lax.fori_loop(0, lax.div(last - block, blocks) + 1, multiply, begin)
