"""Residual addition, RMSNorm and the matrix product that follows, with or without SwiGLU's gate."""

from arctic_jax.pallas_kernels.norm_linear.op import norm_linear as norm_linear
