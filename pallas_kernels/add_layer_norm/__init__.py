"""Residual addition and LayerNorm in one pass over the tokens."""

from arctic_jax.pallas_kernels.add_layer_norm.op import add_layer_norm as add_layer_norm
