"""Residual addition and LayerNorm on Hopper: each warp takes a row, from memory to memory once.

A row lies in the registers of one warp, so its mean and variance are shuffles and no thread waits
for another warp. Many small thread blocks share a multiprocessor and keep its memory busy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPS, LANES = 4, 32  # of a thread block; a row a warp
MAX_PER_THREAD = 64  # elements of a row that a thread may hold in registers


def rows_layout(d: int) -> Any:
    """Return how rows of d elements lie in registers: in vectors of up to 8, a row a warp."""
    vector = next(v for v in (8, 4, 2) if d % (LANES * v) == 0)
    tiles = (WARPS, LANES * vector), (vector,)
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def unsupported(x: jax.ShapeDtypeStruct, *others: jax.ShapeDtypeStruct) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    if any(other.dtype != x.dtype for other in others):
        return f"dtypes differ: {[array.dtype.name for array in (x, *others)]}"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{x.dtype} is not a 16- or 32-bit float"
    T, d = x.shape
    if T % WARPS:
        return f"{T} tokens are no multiple of {WARPS}"
    if d % (2 * LANES) or d > MAX_PER_THREAD * LANES:
        return f"rows of {d} elements are no multiple of {2 * LANES}, or too long for a warp"
    return None


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def add_layer_norm(
    x: Array,
    delta: Array,
    delta_bias: Array,
    weight: Array,
    bias: Array,
    epsilon: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.add_layer_norm`."""
    return plgpu.kernel(
        functools.partial(_body, layout=rows_layout(x.shape[1]), epsilon=epsilon),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(len(x) // WARPS,),
        grid_names=("rows",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # takes layouts as they are given
        ),
        interpret=interpret,
        kernel_name="add_layer_norm",
    )(x, delta, delta_bias, weight, bias)


def _body(
    x_gmem,  # [T, d]
    delta_gmem,  # [T, d]
    delta_bias_gmem,  # [d]
    weight_gmem,  # [d]
    bias_gmem,  # [d]
    out_gmem,  # [T, d]
    *,
    layout: Any,
    epsilon: float,
):
    dtype, d = x_gmem.dtype, x_gmem.shape[1]
    rows = pl.ds(lax.axis_index("rows") * WARPS, WARPS)
    shape = (WARPS, d)

    def load(gmem, layout):
        return plgpu.load(gmem, layout=layout, optimized=False).astype(jnp.float32)

    def spread(values, dimension):
        return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, [dimension]), layout)

    delta_bias, weight, bias = (
        load(gmem, layout.reduce(0)) for gmem in (delta_bias_gmem, weight_gmem, bias_gmem)
    )
    x = load(x_gmem.at[rows], layout) + load(delta_gmem.at[rows], layout) + spread(delta_bias, 1)
    centred = x - spread(x.sum(axis=1) / d, 0)
    scale = lax.rsqrt((centred * centred).sum(axis=1) / d + epsilon)
    out_gmem[rows] = (centred * spread(scale, 0) * spread(weight, 1) + spread(bias, 1)).astype(
        dtype
    )
