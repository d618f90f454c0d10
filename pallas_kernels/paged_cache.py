"""How kernels see the paged cache of all layers: as one row of blocks."""

import jax.numpy as jnp
from jax import Array


def all_blocks(k_cache: Array, v_cache: Array, layer: Array) -> tuple[Array, Array, Array]:
    """Return the caches `[layers * blocks, KV, block_size, D]`, and `[1]`: where a layer begins.

    The tensor memory accelerator has too few dimensions for one more.
    """
    first_block = jnp.asarray(layer * k_cache.shape[1], jnp.int32)
    k_cache, v_cache = (cache.reshape(-1, *cache.shape[2:]) for cache in (k_cache, v_cache))
    return k_cache, v_cache, first_block[None]
