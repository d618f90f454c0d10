"""The first half of a SwiGLU feed-forward: two products and the gate between them."""

from arctic_jax.pallas_kernels.gated_linear_unit.op import gated_linear_unit as gated_linear_unit
