"""Segment attention on Hopper: a thread block takes one head and 64 rows of the flat batch.

Segments lie one after another, so the keys that 64 rows see are one stretch of the batch, from
where the first row's segment begins to where the last row's ends. A thread block reads only those,
in steps of `Config.tile` keys, and masks only steps that some of its rows do not see whole. Short
segments therefore cost little in a wide window.

A thread block is one warpgroup, which asks for the keys of a later step itself; several blocks
share a multiprocessor, and one has the tensor cores while another computes exponentials.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a thread block
LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that a row without any key in a step yields numbers, which decay to 0


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the kernel; on an H200 these are the fastest for segments of 50 and of 512.

    Attributes:
        tile: keys a step.
        stages: steps whose keys and values are in shared memory or on their way.
    """

    tile: int = 64
    stages: int = 2

    def __post_init__(self):
        if self.tile not in (64, 128):
            raise ValueError(f"{self.tile=} must be 64 or 128")
        if self.stages < 1:
            raise ValueError(f"{self.stages=} must be at least 1")


def unsupported(qkv: jax.ShapeDtypeStruct) -> str | None:
    """Return why this kernel does not take the arguments, or `None` if it does."""
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{qkv.dtype} is not a 16-bit float"
    if qkv.shape[2] not in (32, 64, 128):
        return f"head_dim {qkv.shape[2]} is not 32, 64 or 128"
    if qkv.shape[0] % ROWS:
        return f"{qkv.shape[0]} tokens are not a multiple of {ROWS}"
    return None


def stretches(bounds: Array, causal: bool, tile: int) -> tuple[Array, Array]:
    """Say which keys are seen.

    Returns:
        The first key that each token sees and the one after the last, `[2, T]`; and for each 64
        tokens `[4, T / 64]`: the key at which their steps begin, how many there are, and from
        which to which one all of the tokens see all of the keys. int32.
    """
    T = bounds.shape[1]
    starts, stops = bounds
    if causal:
        stops = jnp.arange(1, T + 1, dtype=jnp.int32)
    first, last = starts.reshape(-1, ROWS), stops.reshape(-1, ROWS)
    begin = first[:, 0] // 8 * 8  # rows of shared memory are swizzled eight by eight
    steps = -(-(last[:, -1] - begin) // tile)
    begin = jnp.minimum(begin, T - steps * tile)  # nothing past the end is read
    whole = -(-(first[:, -1] - begin) // tile), (last[:, 0] - begin) // tile
    whole_begin = jnp.minimum(whole[0], steps)
    whole_end = jnp.clip(whole[1], whole_begin, steps)
    return jnp.stack([starts, stops]), jnp.stack([begin, steps, whole_begin, whole_end])


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(
    jax.jit, static_argnames=("num_kv_heads", "scale", "causal", "config", "interpret")
)
def segment_attention(
    qkv: Array,
    bounds: Array,
    num_kv_heads: int,
    scale: float,
    causal: bool,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.segment_attention`."""
    T, heads, D = qkv.shape
    H = heads - 2 * num_kv_heads
    config = config or Config()
    if T % config.tile:
        raise ValueError(f"{T=} is not a multiple of {config.tile=}")
    seen, work = stretches(bounds, causal, config.tile)
    swizzle = min(128, D * qkv.dtype.itemsize)
    swizzled = (
        plgpu.TilingTransform((8, swizzle // qkv.dtype.itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
    ring = plgpu.SMEM((config.stages, config.tile, D), qkv.dtype, transforms=swizzled)
    return plgpu.kernel(
        functools.partial(_body, config=config, num_kv_heads=num_kv_heads, scale=scale),
        out_type=jax.ShapeDtypeStruct((T, H, D), qkv.dtype),
        scratch_types={
            # The result leaves where the queries were.
            "q_smem": plgpu.SMEM((ROWS, D), qkv.dtype, transforms=swizzled),
            "k_smem": ring,
            "v_smem": ring,
            # The interpreter knows no wgmma with an operand in registers.
            "p_smem": plgpu.SMEM((ROWS, config.tile), qkv.dtype) if interpret else None,
            "q_barrier": plgpu.Barrier(),
            "k_barriers": plgpu.Barrier(num_barriers=config.stages),
            "v_barriers": plgpu.Barrier(num_barriers=config.stages),
        },
        # The last one varies fastest: neighbours read the same rows of memory.
        grid=(T // ROWS, H),
        grid_names=("tile", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="segment_attention",
    )(qkv, seen, work)


def _body(
    qkv_gmem,  # [T, H + 2 KV, D]
    seen_gmem,  # [2, T]
    work_gmem,  # [4, T / 64]
    out_gmem,  # [T, H, D]
    *,
    config: Config,
    num_kv_heads: int,
    scale: float,
    q_smem,
    k_smem,
    v_smem,
    p_smem,
    q_barrier,
    k_barriers,
    v_barriers,
):
    H, D = out_gmem.shape[1:]
    tile, stages, dtype = config.tile, config.stages, qkv_gmem.dtype
    index, head = lax.axis_index("tile"), lax.axis_index("head")
    interpreted = p_smem is not None
    rows = pl.ds(pl.multiple_of(index * ROWS, ROWS), ROWS)
    plgpu.copy_gmem_to_smem(qkv_gmem.at[rows, head], q_smem, q_barrier)
    begin, steps, whole_begin, whole_end = (work_gmem[i, index] for i in range(4))
    key_head = H + lax.div(head, jnp.int32(H // num_kv_heads))
    value_head = key_head + num_kv_heads

    def fetch(step, of_head, ring, barriers):
        @pl.when(step < steps)
        def _():
            slot = lax.rem(step, jnp.int32(stages))
            keys = pl.ds(pl.multiple_of(begin + step * tile, 8), tile)
            plgpu.copy_gmem_to_smem(qkv_gmem.at[keys, of_head], ring.at[slot], barriers.at[slot])

    for first in range(stages):
        fetch(jnp.int32(first), key_head, k_smem, k_barriers)
        fetch(jnp.int32(first), value_head, v_smem, v_barriers)

    by_row = plgpu.Layout.WGMMA.reduce(1)
    start, stop = (
        plgpu.load(seen_gmem.at[i, rows], layout=by_row, optimized=False) for i in range(2)
    )
    acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
    row_max = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row)
    row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row)
    plgpu.barrier_wait(q_barrier)

    def step(i, carry, *, masked: bool):
        acc, row_max, row_sum = carry
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(k_barriers.at[slot])

        def qk(scores):
            plgpu.wgmma(scores, q_smem, k_smem.at[slot].transpose((1, 0)))
            return scores[...]

        scores = pl.run_scoped(qk, plgpu.ACC((ROWS, tile), jnp.float32))
        fetch(i + stages, key_head, k_smem, k_barriers)
        factor = scale * LOG2E
        if masked:
            key = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=plgpu.Layout.WGMMA) + (
                begin + i * tile
            )
            visible = (key >= lax.broadcast_in_dim(start, key.shape, [0])) & (
                key < lax.broadcast_in_dim(stop, key.shape, [0])
            )
            # Scaled first: a fused multiply-add of MASKED would leave its rounding error.
            scores = jnp.where(visible, scores * factor, MASKED)
            factor = 1.0
        # The scale is applied in the exponent's multiply-add.
        new_max = jnp.maximum(row_max, scores.max(axis=1) * factor)
        decay = jnp.exp2(row_max - new_max)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_max, scores.shape, [0]))
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        row_sum = row_sum * decay + weights.sum(axis=1)
        weights = weights.astype(dtype)
        plgpu.barrier_wait(v_barriers.at[slot])
        if interpreted:
            p_smem[...] = weights
            plgpu.commit_smem()

        def pv(product):
            plgpu.wgmma(product, p_smem if interpreted else weights, v_smem.at[slot])
            if interpreted:
                return product[...]

        if interpreted:
            acc = acc + pl.run_scoped(pv, plgpu.ACC((ROWS, D), jnp.float32))
        else:
            acc = pl.run_state(pv)(plgpu.ACC.init(acc))
        fetch(i + stages, value_head, v_smem, v_barriers)
        return acc, new_max, row_sum

    edge, inner = (functools.partial(step, masked=masked) for masked in (True, False))
    carry = lax.fori_loop(0, whole_begin, edge, (acc, row_max, row_sum))
    carry = lax.fori_loop(whole_begin, whole_end, inner, carry)
    acc, _, row_sum = lax.fori_loop(whole_end, steps, edge, carry)
    acc = acc / lax.broadcast_in_dim(row_sum, acc.shape, [0])
    q_smem[...] = acc.astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, out_gmem.at[rows, head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
