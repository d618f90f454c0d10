"""Attention over a paged key/value cache."""

from arctic_jax.pallas_kernels.paged_attention.op import paged_attention as paged_attention
