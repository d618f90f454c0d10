"""A bias and GELU in one pass over the activations."""

from arctic_jax.pallas_kernels.bias_gelu.op import bias_gelu as bias_gelu
