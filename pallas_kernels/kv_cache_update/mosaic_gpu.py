"""Key/value cache update on Hopper: one pass that rotates, and writes keys and values in place.

Called by `op.kv_cache_update`. A thread block brings a tile of tokens into shared memory, rotates
the keys there, and sends each token to its slot with one TMA store for the keys and one for the
values. The caches are mutated: in a program that donates them nothing is copied.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TOKENS = 16  # of a thread block: the rows of the register layout below
BY_TOKEN = plgpu.Layout.MMA_ACC(jnp.float32, m_warps=1)  # [16, 32 n], readable at any stride


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the update kernel.

    Attributes:
        heads: key/value heads of a thread block.
    """

    heads: int

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"{self.heads=} must be positive")


def choose_config(T: int, KV: int, D: int, itemsize: int) -> Config:
    """Return the heads a thread block takes: few when there are few tokens, so that many work."""
    fitting = [
        heads
        for heads in range(1, KV + 1)
        if KV % heads == 0 and 2 * TOKENS * heads * D * itemsize <= 96 * 1024
    ]
    tiles = -(-T // TOKENS)
    return Config(next((h for h in reversed(fitting) if tiles * (KV // h) >= 132), 1))


def unsupported(
    k: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct, k_cache: jax.ShapeDtypeStruct
) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    if not k.dtype == v.dtype == k_cache.dtype:
        return f"new keys are {k.dtype}, new values {v.dtype}, the cache is {k_cache.dtype}"
    if k.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the cache is {k.dtype}, not a 16- or 32-bit float"
    if k.shape[2] % 64 or k.shape[2] > 256:
        return f"head_dim {k.shape[2]} is not 64, 128, 192 or 256"
    return None


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def kv_cache_update(
    k: Array,
    v: Array,
    cos: Array,
    sin: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, Array]:
    """See `op.kv_cache_update`."""
    T, KV, D = k.shape
    config = config or choose_config(T, KV, D, k.dtype.itemsize)
    k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
    tile = plgpu.SMEM((TOKENS, config.heads, D), k.dtype)
    angles = plgpu.SMEM((TOKENS, D // 2), jnp.float32)
    mesh = plgpu.Mesh(
        grid=(-(-T // TOKENS), KV // config.heads),
        grid_names=("tile", "heads"),
        kernel_name="kv_cache_update",
    )

    def body(*refs):
        pl.run_scoped(
            functools.partial(_body, *refs, heads=config.heads),
            k_smem=tile,
            v_smem=tile,
            cos_smem=angles,
            sin_smem=angles,
            k_barrier=plgpu.Barrier(num_arrivals=3),
            v_barrier=plgpu.Barrier(),
        )

    # Lane semantics: the tiles stay as declared, any number of tokens may be read past the end.
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    pl.kernel(body, mesh=mesh, compiler_params=params, interpret=interpret or False)(
        k, v, cos, sin, slot_mapping, k_ref, v_ref
    )
    return jax.freeze(k_ref), jax.freeze(v_ref)


def _body(
    k_gmem,  # [T, KV, D]
    v_gmem,  # [T, KV, D]
    cos_gmem,  # [T, D / 2]
    sin_gmem,  # [T, D / 2]
    slots_gmem,  # [T]
    k_cache_gmem,  # [blocks, KV, block_size, D], written
    v_cache_gmem,  # [blocks, KV, block_size, D], written
    *,
    heads: int,
    k_smem,
    v_smem,
    cos_smem,
    sin_smem,
    k_barrier,
    v_barrier,
):
    T, _, D = k_gmem.shape
    half, block_size = D // 2, k_cache_gmem.shape[2]
    first = lax.axis_index("tile") * TOKENS
    mine = pl.ds(lax.axis_index("heads") * heads, heads)
    tokens = pl.ds(first, TOKENS)  # past the last token TMA reads zeros
    plgpu.copy_gmem_to_smem(k_gmem.at[tokens, mine], k_smem, k_barrier)
    plgpu.copy_gmem_to_smem(cos_gmem.at[tokens], cos_smem, k_barrier)
    plgpu.copy_gmem_to_smem(sin_gmem.at[tokens], sin_smem, k_barrier)
    plgpu.copy_gmem_to_smem(v_gmem.at[tokens, mine], v_smem, v_barrier)
    slots = [
        jnp.where(first + i < T, slots_gmem[jnp.minimum(first + i, T - 1)], -1)
        for i in range(TOKENS)
    ]

    def store(tile_smem, cache_gmem):
        for i, slot in enumerate(slots):

            @pl.when(slot >= 0)
            def _(i=i, slot=slot):
                block, offset = lax.div(slot, block_size), lax.rem(slot, block_size)
                plgpu.copy_smem_to_gmem(tile_smem.at[i], cache_gmem.at[block, mine, offset])

    plgpu.barrier_wait(v_barrier)
    store(v_smem, v_cache_gmem)

    plgpu.barrier_wait(k_barrier)
    load = functools.partial(plgpu.load, layout=BY_TOKEN, optimized=False)
    cos, sin = load(cos_smem), load(sin_smem)
    for head in range(heads):
        low, high = k_smem.at[:, head, pl.ds(0, half)], k_smem.at[:, head, pl.ds(half, half)]
        x, y = load(low).astype(jnp.float32), load(high).astype(jnp.float32)
        low[...] = (x * cos - y * sin).astype(k_smem.dtype)
        high[...] = (y * cos + x * sin).astype(k_smem.dtype)
    plgpu.commit_smem()
    store(k_smem, k_cache_gmem)
    plgpu.wait_smem_to_gmem(0)
