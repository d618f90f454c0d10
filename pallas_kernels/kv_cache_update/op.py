"""Key/value cache update: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float, Int

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.kv_cache_update import mosaic_gpu, reference


def kv_cache_update(
    qkv: Float[Array, "T G L r+2 D"],
    cos: Float[Array, "T D/2"],
    sin: Float[Array, "T D/2"],
    k_cache: Float[Array, "layers blocks G block_size D"],
    v_cache: Float[Array, "layers blocks G block_size D"],
    layer: Int[Array, ""],
    slot_mapping: Int[Array, " T"],
    *,
    q_norm: Float[Array, "L D"] | None = None,
    k_norm: Float[Array, "L D"] | None = None,
    epsilon: float = 0.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "T G*L*r D"], Array, Array]:
    """Rotate queries and keys of a fused projection; write keys and values into their slots.

    The projection of L layers comes as the matrix product leaves it: for each token, key/value head
    (group) and layer, the r query heads of the group, the key, the value. An attention layer has
    L = 1; a projection of keys and values alone, for several layers at once, has r = 0.

    Slot `block * block_size + offset`; the tokens with slot -1 (padding) write nothing. G may be a
    shard of the model's groups. In a program that donates the caches the write is in place.

    A value that is not finite is written as 0: a weight of 0 does not hide it, so one damaged token
    would reach the queries before it, and other requests through their common prefix. Queries and
    keys stay as they are.

    Args:
        qkv: queries and keys before the rotary embedding, in the half-split order of Hugging Face.
        cos: cosines of the tokens' angles, float32.
        sin: sines, float32.
        k_cache: keys of all layers and blocks.
        v_cache: values, likewise.
        layer: the first of the L layers, which are neighbours.
        slot_mapping: where each token goes, in every layer.
        q_norm: weights of a root-mean-square norm over D of each query before the rotation.
        k_norm: the same for each key.
        epsilon: of those norms.
        implementation: see `dispatch.resolve`.

    Returns:
        The queries in the order of `qkv`, and the caches.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    T, G, L, rows, D = qkv.shape
    if k_cache.shape != v_cache.shape or k_cache.shape[2::2] != (G, D) or rows < 2:
        raise ValueError(f"{qkv.shape=}, {k_cache.shape=} and {v_cache.shape=} do not fit")
    if k_cache.shape[0] < L:
        raise ValueError(f"{qkv.shape=} has more layers than {k_cache.shape=}")
    if slot_mapping.shape != (T,) or not cos.shape == sin.shape == (T, D // 2):
        raise ValueError(f"{slot_mapping.shape=}, {cos.shape=}, {sin.shape=} and {qkv.shape=}")
    if any(norm is not None and norm.shape != (L, D) for norm in (q_norm, k_norm)):
        raise ValueError(f"{q_norm=} and {k_norm=} do not fit {qkv.shape=}")
    arrays = (qkv, cos, sin, k_cache, v_cache, layer, slot_mapping)
    norms = {"q_norm": q_norm, "k_norm": k_norm, "epsilon": epsilon}
    reason = mosaic_gpu_unsupported(*arrays, **norms)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("kv_cache_update", implementation, preferred)
    if chosen == "xla":
        return reference.kv_cache_update(*arrays, **norms)
    if reason:
        raise ValueError(f"kv_cache_update: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.kv_cache_update(*arrays, **norms, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(
    qkv: Array, cos: Array, sin: Array, k_cache: Array, *_: object, **__: object
) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `kv_cache_update`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(qkv, k_cache)
