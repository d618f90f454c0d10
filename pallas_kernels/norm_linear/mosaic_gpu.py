"""Residual addition, RMSNorm and matrix product on Hopper; for few tokens all in one kernel.

One token's product only streams the weights through, so all that happens between two products is
time in which the memory system rests. Here the first weights are on their way before the norm is
begun, which every thread block does for itself; then each multiplies rows of the weight, those of
the next step always under way. A few tokens do the same where the weight is small, up to four of
them a thread block: there launches take as long as the product. With more the kernel of
`add_rms_norm` goes before the product of `linear`.
"""

import functools
import math
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
MAX_ROW = 1024  # elements of a weight's row, of which a warp has a few, and as many of each token
MAX_PRODUCTS = 2**24  # of several tokens: more of them outweigh a launch


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


def rows_of_step(tokens: int, K: int, F: int, parts: int, shards: int) -> int:
    """Return how many of F rows, each in `parts` matrices, a thread block multiplies at once.

    0 if there is too much to do for one kernel, or the rows do not fit `rows_layout`, or results
    cannot be stored in pairs.
    """
    rows = [2**i for i in range(1, 7) if F % 2**i == 0 and 2**i * parts * K <= STEP]
    if not by_warp(tokens, K):
        return max(rows, default=0)
    if K % (2 * LANES):
        return 0
    if tokens > 1 and (K > MAX_ROW or tokens * shards * parts * F * K > MAX_PRODUCTS):
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
    rows = rows_of_step(tokens, K, F, parts, shards)
    if bias is not None or weight.dtype.itemsize != 2 or not rows:
        x, normed = norm.add_rms_norm(x, delta, norm_weight, epsilon, interpret)
        return x, linear(normed, weight, bias, gated=gated)
    together = math.gcd(tokens, 4)
    return plgpu.kernel(
        functools.partial(_body, rows=rows, together=together, epsilon=epsilon),
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((tokens, shards * F), x.dtype),
        ],
        grid=(min(BLOCKS, shards * F // rows), tokens // together),
        grid_names=("block", "tokens"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # takes layouts as they are given
        ),
        interpret=interpret,
        kernel_name="norm_matvec",
    )(x, delta, norm_weight, matrices)


def by_warp(tokens: int, K: int) -> bool:
    """Return whether a warp has whole rows: several tokens' sums need no other, or K is too odd."""
    return tokens > 1 or K % (2 * WARPS * LANES) != 0


def rows_layout(tokens: int, K: int) -> Any:
    """Return how rows of K elements lie in registers.

    Each is divided among all the threads, or among those of a warp.
    """
    if not by_warp(tokens, K):
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
    x_gmem,  # [T, K]
    delta_gmem,  # [T, K]
    norm_weight_gmem,  # [K]
    weight_gmem,  # [shards, 1 or 2, F, K]
    sum_gmem,  # [T, K]
    out_gmem,  # [T, shards * F]
    *,
    rows: int,
    together: int,
    epsilon: float,
):
    shards, parts, F, K = weight_gmem.shape
    dtype, block, blocks = x_gmem.dtype, lax.axis_index("block"), lax.axis_size("block")
    steps_of_shard = F // rows
    last = shards * steps_of_shard - 1
    tokens = [lax.axis_index("tokens") * together + i for i in range(together)]
    by_row = rows_layout(x_gmem.shape[0], K)
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
    norm_weight = load(norm_weight_gmem, layout=by_element).astype(jnp.float32)

    def norm_of(token):
        x, delta = (load(gmem.at[token], layout=by_element) for gmem in (x_gmem, delta_gmem))
        x = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(dtype)

        @pl.when(block == 0)
        def _():
            sum_gmem[token] = x

        x = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(x * x) / K + epsilon)
        normed = ((x * scale).astype(dtype).astype(jnp.float32) * norm_weight).astype(dtype)
        normed = lax.broadcast_in_dim(normed.astype(jnp.float32), (rows, K), [1])
        return plgpu.layout_cast(normed, by_row)

    normed = [norm_of(token) for token in tokens]

    def multiply(i, weights):
        step = block + i * blocks
        following = fetch(step + blocks)
        for token, x in zip(tokens, normed, strict=True):
            products = [jnp.sum(part.astype(jnp.float32) * x, axis=1) for part in weights]
            if parts == 1:
                (out,) = products
            else:
                gate, up = products
                out = gate / (1 + jnp.exp(-gate)) * up
            out_gmem[token, pl.ds(step * rows, rows)] = out.astype(dtype)
        return following

    lax.fori_loop(0, lax.div(last - block, blocks) + 1, multiply, begin)
