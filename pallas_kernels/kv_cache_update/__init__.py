"""Rotary embedding of queries and keys, and the write of keys and values into their blocks."""

from arctic_jax.pallas_kernels.kv_cache_update.op import kv_cache_update as kv_cache_update
