"""Key/value cache update on Hopper: one pass over the fused projection, caches written in place.

Called by `op.kv_cache_update`. A thread block brings a tile of tokens and groups of one layer into
shared memory, rotates queries and keys there, and sends the queries off with one TMA store, the key
and the value of each token to its slot with one store each. The caches are mutated: in a program
that donates them nothing is copied.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels.paged_cache import all_blocks

TOKENS = 4  # of a thread block: one a warp
MAX_TILES = 65535  # what the slowest dimension of a grid may have
TILE_BYTES = 6 * 1024  # below, thread blocks are too small to be worth their start


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the update kernel.

    Attributes:
        groups: key/value heads of a thread block.
    """

    groups: int

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"{self.groups=} must be positive")


def choose_config(G: int, group_bytes: int) -> Config:
    """Return the sizes for `G` groups that have `group_bytes` a token in one layer.

    What measured best on an H200, for one token and for 8,192: thread blocks as small as is sound.
    """
    divisors = (groups for groups in range(1, G + 1) if G % groups == 0)
    enough = (groups for groups in divisors if TOKENS * groups * group_bytes >= TILE_BYTES)
    return Config(next(enough, G))


def unsupported(qkv: jax.ShapeDtypeStruct, cache: jax.ShapeDtypeStruct) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    D = qkv.shape[-1]
    if qkv.dtype != cache.dtype:
        return f"the projection is {qkv.dtype}, the cache is {cache.dtype}"
    if qkv.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the cache is {qkv.dtype}, not a 16- or 32-bit float"
    if D % 64 or D > 256:
        return f"head_dim {D} is not 64, 128, 192 or 256"
    if qkv.shape[0] > TOKENS * MAX_TILES:
        return f"{qkv.shape[0]} tokens are more than {TOKENS * MAX_TILES}"
    return None


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames=("epsilon", "config", "interpret"))
def kv_cache_update(
    qkv: Array,
    cos: Array,
    sin: Array,
    k_cache: Array,
    v_cache: Array,
    layer: Array,
    slot_mapping: Array,
    *,
    q_norm: Array | None,
    k_norm: Array | None,
    epsilon: float,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, Array, Array]:
    """See `op.kv_cache_update`."""
    T, G, L, rows, D = qkv.shape
    r = rows - 2
    config = config or choose_config(G, rows * D * qkv.dtype.itemsize)
    groups = config.groups
    *caches, first_block = all_blocks(k_cache, v_cache, layer)
    caches = [jax.new_ref(cache) for cache in caches]
    norms = {"q_norm": q_norm if r else None, "k_norm": k_norm}
    norms = {name: norm for name, norm in norms.items() if norm is not None}
    mesh = plgpu.Mesh(
        grid=(-(-T // TOKENS), G // groups, L),  # in the order of the memory that is read
        grid_names=("tile", "group", "layer"),
    )

    def body(qkv_gmem, cos_gmem, sin_gmem, slots_gmem, first_gmem, *refs):
        weights = dict(zip(norms, refs, strict=False))
        tile = functools.partial(plgpu.SMEM, dtype=qkv.dtype)
        angles = plgpu.SMEM((TOKENS, D // 2), jnp.float32)
        pl.run_scoped(
            functools.partial(
                _body,
                qkv_gmem,
                cos_gmem,
                sin_gmem,
                slots_gmem,
                first_gmem,
                weights,
                *refs[len(weights) :],
                blocks=k_cache.shape[1],
                epsilon=epsilon,
                config=config,
            ),
            q_smem=tile((TOKENS, groups, r, D)) if r else None,
            k_smem=tile((TOKENS, groups, D)),
            v_smem=tile((TOKENS, groups, D)),
            cos_smem=angles,
            sin_smem=angles,
            barrier=plgpu.Barrier(num_arrivals=5 if r else 4),
        )

    out = pl.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((T, G, L, r, D), qkv.dtype)] if r else [],
        mesh=mesh,
        # Lane semantics: the tiles stay as declared, any number of tokens may be read past the end.
        # No barriers of its own accord: a thread only reads what it overwrites itself.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret or False,
        name="kv_cache_update",
    )(qkv, cos, sin, slot_mapping, first_block, *norms.values(), *caches)
    q = out[0].reshape(T, G * L * r, D) if r else jnp.zeros((T, 0, D), qkv.dtype)
    k_cache, v_cache = (jax.freeze(cache).reshape(k_cache.shape) for cache in caches)
    return q, k_cache, v_cache


def _body(
    qkv_gmem,  # [T, G, L, r + 2, D]
    cos_gmem,  # [T, D / 2]
    sin_gmem,  # [T, D / 2]
    slots_gmem,  # [T]
    first_gmem,  # [1], the first layer's first block
    norms_gmem,  # those of "q_norm", "k_norm" that there are: [L, D]
    k_cache_gmem,  # [layers * blocks, G, block_size, D], written
    v_cache_gmem,  # [layers * blocks, G, block_size, D], written
    q_out_gmem=None,  # [T, G, L, r, D], if there are queries
    *,
    blocks: int,
    epsilon: float,
    config: Config,
    q_smem,
    k_smem,
    v_smem,
    cos_smem,
    sin_smem,
    barrier,
):
    T, _, _, rows, D = qkv_gmem.shape
    r, half, block_size = rows - 2, D // 2, k_cache_gmem.shape[2]
    layer = lax.axis_index("layer")
    first = lax.axis_index("tile") * TOKENS
    tokens = pl.ds(first, TOKENS)  # past the last token TMA reads zeros and writes nothing
    mine = pl.ds(lax.axis_index("group") * config.groups, config.groups)
    if r:
        plgpu.copy_gmem_to_smem(qkv_gmem.at[tokens, mine, layer, pl.ds(0, r)], q_smem, barrier)
    plgpu.copy_gmem_to_smem(qkv_gmem.at[tokens, mine, layer, r], k_smem, barrier)
    plgpu.copy_gmem_to_smem(qkv_gmem.at[tokens, mine, layer, r + 1], v_smem, barrier)
    plgpu.copy_gmem_to_smem(cos_gmem.at[tokens], cos_smem, barrier)
    plgpu.copy_gmem_to_smem(sin_gmem.at[tokens], sin_smem, barrier)
    first_block = first_gmem[0] + layer * blocks
    slots = [
        jnp.where(first + i < T, slots_gmem[jnp.minimum(first + i, T - 1)], -1)
        for i in range(TOKENS)
    ]

    # One token a warp, the lanes along D: no two of them meet in a bank.
    vector = math.gcd(half // 32, 4)
    by_token = plgpu.Layout.TILED(
        plgpu.Tiling(((4, 32 * vector), (vector,))), (-3,), (-2,), vector_dim=-1
    )
    load = functools.partial(plgpu.load, layout=by_token, optimized=False)

    def spread(x, axis):
        """Repeat a vector along the other axis of `[TOKENS, half]`."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (TOKENS, half), [axis]), by_token)

    def weight_halves(norm_gmem):
        for begin in (0, half):
            weight = norm_gmem.at[layer, pl.ds(begin, half)]
            weight = plgpu.load(weight, layout=by_token.reduce(0), optimized=False)
            yield spread(weight.astype(jnp.float32), 1)

    weights = {name: tuple(weight_halves(norm)) for name, norm in norms_gmem.items()}
    plgpu.barrier_wait(barrier)
    cos, sin = load(cos_smem), load(sin_smem)

    def rotate(low, high, norm):
        x, y = load(low).astype(jnp.float32), load(high).astype(jnp.float32)
        if norm in weights:
            mean = (x * x + y * y).sum(axis=1) * (1 / D)
            scale = spread(lax.rsqrt(mean + epsilon), 0)
            x, y = x * scale * weights[norm][0], y * scale * weights[norm][1]
        low[...] = (x * cos - y * sin).astype(k_smem.dtype)
        high[...] = (y * cos + x * sin).astype(k_smem.dtype)

    for group in range(config.groups):
        low, high = pl.ds(0, half), pl.ds(half, half)
        for head in range(r):
            rotate(q_smem.at[:, group, head, low], q_smem.at[:, group, head, high], "q_norm")
        rotate(k_smem.at[:, group, low], k_smem.at[:, group, high], "k_norm")
        v = load(v_smem.at[:, group]).astype(jnp.float32)
        finite = jnp.abs(v) < jnp.inf
        v_smem[:, group] = jnp.where(finite, v, jnp.zeros_like(v)).astype(v_smem.dtype)
    plgpu.commit_smem()

    if q_out_gmem is not None:
        plgpu.copy_smem_to_gmem(q_smem, q_out_gmem.at[tokens, mine, layer])

    for i, slot in enumerate(slots):

        @pl.when(slot >= 0)
        def _(i=i, slot=slot):
            block, offset = first_block + lax.div(slot, block_size), lax.rem(slot, block_size)
            plgpu.copy_smem_to_gmem(k_smem.at[i], k_cache_gmem.at[block, mine, offset])
            plgpu.copy_smem_to_gmem(v_smem.at[i], v_cache_gmem.at[block, mine, offset])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
