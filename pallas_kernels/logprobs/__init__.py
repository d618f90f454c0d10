"""Log-probability and rank of a token in each row of logits, and the likeliest tokens."""

from arctic_jax.pallas_kernels.logprobs.op import logprobs as logprobs
