"""The sum over devices as XLA does it: the specification, and the implementation `"xla"`."""

from jax import Array, lax


def all_reduce(x: Array, axes: tuple[str, ...]) -> Array:
    """See `op.all_reduce`; the partial sums are of the dtype of `x`, in an order of XLA's."""
    return lax.psum(x, axes)
