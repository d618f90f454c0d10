"""GELU of the product of tokens with a weight: the first half of an encoder's feed-forward."""

from arctic_jax.pallas_kernels.linear_gelu.op import linear_gelu as linear_gelu
