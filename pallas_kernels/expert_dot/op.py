"""Product of few rows with matrices of their own: the public function, its checks and dispatch."""

from jax import Array
from jaxtyping import Float, Int32

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.expert_dot import mosaic_gpu, reference


def expert_dot(
    rows: Float[Array, "M K"],
    weight: Float[Array, "G N K"],
    experts: Int32[Array, " M"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiply each row by the transposed matrix of its expert.

    Sums are float32, the result has the dtype of `rows`. What `ragged_dot` does with rows that are
    sorted by expert, and counted: a few need neither, only that most have an expert of their own.

    Args:
        rows: in any order.
        weight: a matrix for each expert, one row an output.
        experts: of each row; one that there is not (less than 0, or G and more) for a row whose
            product nobody wants.
        implementation: see `dispatch.resolve`.

    Returns:
        The products. Those of rows without an expert are anything, NaN included.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if rows.ndim != 2 or weight.ndim != 3 or weight.shape[2] != rows.shape[1]:
        raise ValueError(f"{rows.shape=} and {weight.shape=} do not fit")
    if experts.shape != rows.shape[:1]:
        raise ValueError(f"{experts.shape=} does not fit {rows.shape=}")
    reason = mosaic_gpu_unsupported(rows, weight, experts)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("expert_dot", implementation, preferred)
    if chosen == "xla":
        return reference.expert_dot(rows, weight, experts)
    if reason:
        raise ValueError(f"expert_dot: implementation='mosaic_gpu' cannot do this: {reason}")
    return mosaic_gpu.expert_dot(rows, weight, experts, interpret=dispatch.interpreter())


def mosaic_gpu_unsupported(rows: Array, weight: Array, experts: Array, **_: object) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `expert_dot`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    del experts
    return mosaic_gpu.unsupported(rows, weight)
