"""Attention within each segment of a packed batch, without a cache: what encoders do."""

from arctic_jax.pallas_kernels.segment_attention.op import segment_attention as segment_attention
