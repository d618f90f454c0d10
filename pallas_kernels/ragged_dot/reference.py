"""Grouped product by `jax.lax`: the specification, and the implementation `"xla"`.

XLA expands it, for CPUs and NVIDIA GPUs, into one dense product with a copy of the rows for each
group, zero outside of it: right, but G times the work and memory.
"""

from jax import Array, lax

_DIMENSIONS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def ragged_dot(rows: Array, weight: Array, group_sizes: Array) -> Array:
    """See `op.ragged_dot`."""
    return lax.ragged_dot_general(rows, weight, group_sizes, _DIMENSIONS)
