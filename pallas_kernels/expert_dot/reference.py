"""Product of few rows with matrices of their own in plain jnp: the specification, and `"xla"`.

The matrices are gathered, which is a copy of each; but of no others.
"""

import jax.numpy as jnp
from jax import Array


def expert_dot(rows: Array, weight: Array, experts: Array) -> Array:
    """See `op.expert_dot`."""
    of_row = weight[jnp.clip(experts, 0, len(weight) - 1)]
    product = jnp.einsum("mk,mnk->mn", rows, of_row, preferred_element_type=jnp.float32)
    return product.astype(rows.dtype)
