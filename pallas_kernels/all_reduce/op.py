"""Sums over devices: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float, Int32

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.all_reduce import mosaic_gpu, reference
from arctic_jax.pallas_kernels.all_reduce.inboxes import num_devices


def all_reduce(
    x: Float[Array, "T d"],
    axes: tuple[str, ...],
    inboxes: Int32[Array, "1 words"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "T d"]:
    """Sum the devices' `x` over mesh axes; inside `jax.shard_map`.

    Every device gets the same bits: the kernel adds the parts in the order of the devices, in
    float32, and rounds once. All devices must make the same calls in the same order, and no two
    calls that get the same `inboxes` may run at once: each must depend on the one before.

    Args:
        x: this device's part.
        axes: of the mesh.
        inboxes: this device's row of `Inboxes.addresses`, of the devices along all of `axes` and
            no others; `None` if there are none, and for another choice of axes.
        implementation: see `dispatch.resolve`. The kernel is one launch within a CUDA graph;
            XLA's sum, by NCCL, ends the graph, and the host starts it.

    Raises:
        ValueError: the implementation asked for cannot do this; the message says why.
    """
    reason = mosaic_gpu_unsupported(x, inboxes)
    preferred = "xla" if reason else "mosaic_gpu"
    chosen = dispatch.resolve("all_reduce", implementation, preferred)
    if chosen == "xla":
        return reference.all_reduce(x, axes)
    if reason:
        raise ValueError(f"all_reduce: implementation='mosaic_gpu' cannot do this: {reason}")
    assert inboxes is not None
    return mosaic_gpu.all_reduce(x, inboxes, mosaic_gpu.best_rounds(x, num_devices(inboxes)))


def mosaic_gpu_unsupported(x: Array, inboxes: Array | None) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `all_reduce`, or `None`.

    With `implementation=None` such calls go to `"xla"`. Only shapes and dtypes are looked at.
    """
    if inboxes is None:
        return "there are no inboxes"
    if dispatch.interpreter() is not None:
        return "the interpreter has no memory of other devices"
    return mosaic_gpu.unsupported(x, num_devices(inboxes))
