"""Residual addition and RMS normalisation in one pass."""

from arctic_jax.pallas_kernels.add_rms_norm.op import add_rms_norm as add_rms_norm
