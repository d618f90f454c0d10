"""A bias and GELU on Hopper: each thread block takes a few rows of some columns, once.

Many small thread blocks share a multiprocessor: one computes polynomials while others load.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels.bias_gelu.reference import polynomial_gelu

ROWS, LANES, VECTOR = 4, 32, 8  # a row a warp; elements that a thread loads at once
MAX_COLUMNS = 1024  # of a thread block


def columns_of_block(d: int) -> int | None:
    """Return the most columns that a thread block may take, or `None` if d cannot be cut so."""
    step = LANES * VECTOR
    return next((n for n in range(MAX_COLUMNS, 0, -step) if d % n == 0), None)


def unsupported(x: jax.ShapeDtypeStruct, bias: jax.ShapeDtypeStruct) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    if x.dtype not in (jnp.bfloat16, jnp.float16) or bias.dtype != x.dtype:
        return f"{x.dtype} and {bias.dtype} are not the same 16-bit float"
    T, d = x.shape
    if T % ROWS:
        return f"{T} tokens are no multiple of {ROWS}"
    if columns_of_block(d) is None:
        return f"rows of {d} elements are no multiple of {LANES * VECTOR}"
    return None


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames="interpret")
def bias_gelu(x: Array, bias: Array, interpret: plgpu.InterpretGPUParams | None = None) -> Array:
    """See `op.bias_gelu`."""
    T, d = x.shape
    columns = columns_of_block(d)
    if columns is None:
        raise ValueError(f"rows of {d} elements cannot be cut")
    tiles = plgpu.Tiling(((ROWS, LANES * VECTOR), (VECTOR,)))
    layout = plgpu.Layout.TILED(tiles, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    return plgpu.kernel(
        functools.partial(_body, columns=columns, layout=layout),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        # The last one varies fastest: neighbours read the same rows of memory.
        grid=(T // ROWS, d // columns),
        grid_names=("rows", "columns"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # takes layouts as they are given
        ),
        interpret=interpret,
        kernel_name="bias_gelu",
    )(x, bias)


def _body(
    x_gmem,  # [T, d]
    bias_gmem,  # [d]
    out_gmem,  # [T, d]
    *,
    columns: int,
    layout: Any,
):
    rows = pl.ds(lax.axis_index("rows") * ROWS, ROWS)
    part = pl.ds(lax.axis_index("columns") * columns, columns)
    x = plgpu.load(x_gmem.at[rows, part], layout=layout, optimized=False)
    bias = plgpu.load(bias_gmem.at[part], layout=layout.reduce(0), optimized=False)
    # The cast follows at once: it says how the broadcast is to lie.
    bias = lax.broadcast_in_dim(bias.astype(jnp.float32), x.shape, [1])
    bias = plgpu.layout_cast(bias, layout)
    out_gmem[rows, part] = polynomial_gelu(x.astype(jnp.float32) + bias).astype(out_gmem.dtype)
