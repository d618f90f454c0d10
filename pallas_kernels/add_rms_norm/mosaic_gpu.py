"""Residual addition and RMSNorm on Hopper.

One warpgroup a token: the row goes from global memory to registers and back, once, without the
detour through shared memory, whose latency a single token would feel. With many tokens as many
thread blocks are on a multiprocessor as its registers hold, so the memory system is kept busy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPS, LANES = 4, 32  # of a warpgroup
MAX_PER_THREAD = 128  # elements of a row that a thread may hold in registers


def row_layout(d: int) -> Any:
    """Return how the d elements of a row, a multiple of 64, lie in a warpgroup's registers.

    The threads take neighbouring vectors, of up to 8 elements. Where a row cannot be divided among
    128 threads, each warp takes all of it.
    """
    vector = next((v for v in (8, 4, 2) if d % (WARPS * LANES * v) == 0), 2)
    warps, tiles = plgpu.Replicated(WARPS), ((LANES * vector,), (vector,))
    if d % (WARPS * LANES * vector) == 0:
        warps, tiles = -3, ((WARPS * LANES * vector,), *tiles)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(warps,), lane_dims=(-2,), vector_dim=-1
    )


def unsupported(
    x: jax.ShapeDtypeStruct, delta: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct
) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    if not x.dtype == delta.dtype == weight.dtype:
        return f"dtypes differ: {x.dtype=}, {delta.dtype=}, {weight.dtype=}"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{x.dtype} is not a 16- or 32-bit float"
    d = x.shape[1]
    threads = LANES if d % (2 * WARPS * LANES) else WARPS * LANES
    if d % 64 or d > MAX_PER_THREAD * threads:
        return f"rows of {d} elements are no multiple of 64, or too long for {threads} threads"
    return None


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def add_rms_norm(
    x: Array,
    delta: Array,
    weight: Array,
    epsilon: float,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, Array]:
    """See `op.add_rms_norm`."""
    T, d = x.shape
    return plgpu.kernel(
        functools.partial(_body, layout=row_layout(d), epsilon=epsilon),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        grid=(T,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane  # takes the layout as it is given
        ),
        interpret=interpret,
        kernel_name="add_rms_norm",
    )(x, delta, weight)


def _body(
    x_gmem,  # [T, d]
    delta_gmem,  # [T, d]
    weight_gmem,  # [d]
    sum_gmem,  # [T, d]
    normed_gmem,  # [T, d]
    *,
    layout: Any,
    epsilon: float,
):
    token, dtype, d = lax.axis_index("token"), x_gmem.dtype, x_gmem.shape[1]
    load = functools.partial(plgpu.load, layout=layout, optimized=False)
    x, delta = load(x_gmem.at[token]), load(delta_gmem.at[token])
    weight = load(weight_gmem).astype(jnp.float32)
    x = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(dtype)
    sum_gmem[token] = x
    x = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.sum(x * x) / d + epsilon)
    normed_gmem[token] = ((x * scale).astype(dtype).astype(jnp.float32) * weight).astype(dtype)
