"""The product of tokens with a stored weight, with or without SwiGLU's gate."""

from arctic_jax.pallas_kernels.linear.op import linear as linear
