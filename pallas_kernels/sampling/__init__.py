"""From logits to tokens: penalties, biases, temperature, min-p, top-k, top-p and the draw."""

from arctic_jax.pallas_kernels.sampling.op import sampling as sampling
