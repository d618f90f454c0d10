"""Product of few rows, each with the matrix of its own expert: a mixture's decode step."""

from arctic_jax.pallas_kernels.expert_dot.op import expert_dot as expert_dot
