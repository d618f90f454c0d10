"""Draft verification: a draw for each row, and which of them count."""

from arctic_jax.pallas_kernels.verification.op import verification as verification
