"""Grouped product: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float, Int32

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.ragged_dot import mosaic_gpu, reference


def ragged_dot(
    rows: Float[Array, "M K"],
    weight: Float[Array, "G N K"],
    group_sizes: Int32[Array, " G"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiply each row by the transposed matrix of its group (grouped GEMM; Gale et al. 2022).

    Sums are float32, the result has the dtype of `rows`.

    Args:
        rows: sorted by group: the first `group_sizes[0]` rows are of group 0, and so on.
        weight: a matrix for each group, one row an output.
        group_sizes: rows of each group, 0 for some perhaps. Their sum may be less than M.
        implementation: see `dispatch.resolve`.

    Returns:
        The products. The rows past the last group hold anything, NaN included.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if rows.ndim != 2 or weight.ndim != 3 or weight.shape[2] != rows.shape[1]:
        raise ValueError(f"{rows.shape=} and {weight.shape=} do not fit")
    if group_sizes.shape != weight.shape[:1]:
        raise ValueError(f"{group_sizes.shape=} does not fit {weight.shape=}")
    reason = mosaic_gpu_unsupported(rows, weight, group_sizes)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("ragged_dot", implementation, preferred)
    if chosen == "xla":
        return reference.ragged_dot(rows, weight, group_sizes)
    if reason:
        raise ValueError(f"ragged_dot: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.ragged_dot(rows, weight, group_sizes, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(
    rows: Array, weight: Array, group_sizes: Array, **_: object
) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `ragged_dot`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    del group_sizes
    return mosaic_gpu.unsupported(rows, weight)
