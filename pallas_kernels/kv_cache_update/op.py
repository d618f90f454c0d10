"""Key/value cache update: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float, Int

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.kv_cache_update import mosaic_gpu, reference


def kv_cache_update(
    k: Float[Array, "T KV D"],
    v: Float[Array, "T KV D"],
    cos: Float[Array, "T D/2"],
    sin: Float[Array, "T D/2"],
    k_cache: Float[Array, "blocks KV block_size D"],
    v_cache: Float[Array, "blocks KV block_size D"],
    slot_mapping: Int[Array, " T"],
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Rotate `k` by `cos` and `sin` and write `k` and `v` into the slots of their tokens.

    Slot `block * block_size + offset`; the tokens with slot -1 (padding) write nothing. KV may be a
    shard of the model's heads. In a program that donates the caches the write is in place.

    Args:
        k: keys before the rotary embedding, in the half-split order of Hugging Face.
        v: values.
        cos: cosines of the tokens' angles, float32.
        sin: sines, float32.
        k_cache: keys of all blocks.
        v_cache: values of all blocks.
        slot_mapping: where each token goes.
        implementation: see `dispatch.resolve`.

    Returns:
        The two caches.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if k.shape != v.shape or k_cache.shape != v_cache.shape:
        raise ValueError(f"{k.shape=}, {v.shape=}, {k_cache.shape=}, {v_cache.shape=}")
    if k.shape[1:] != (k_cache.shape[1], k_cache.shape[3]):
        raise ValueError(f"{k.shape=} does not fit {k_cache.shape=}")
    if slot_mapping.shape != k.shape[:1] or cos.shape != (k.shape[0], k.shape[2] // 2):
        raise ValueError(f"{slot_mapping.shape=} and {cos.shape=} do not fit {k.shape=}")
    arrays = (k, v, cos, sin, k_cache, v_cache, slot_mapping)
    reason = mosaic_gpu_unsupported(*arrays)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("kv_cache_update", implementation, preferred)
    if chosen == "xla":
        return reference.kv_cache_update(*arrays)
    if reason:
        raise ValueError(f"kv_cache_update: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.kv_cache_update(*arrays, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(
    k: Array, v: Array, cos: Array, sin: Array, k_cache: Array, *_: Array
) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `kv_cache_update`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(k, v, k_cache)
