"""The product of sorted rows with the matrix of their group: what a mixture of experts does."""

from arctic_jax.pallas_kernels.ragged_dot.op import ragged_dot as ragged_dot
