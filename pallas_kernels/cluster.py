"""Waiting for the other thread blocks of a cluster; device code of several kernels."""

from typing import Any

from jax.experimental.mosaic.gpu.utils import inline_ptx
from jax.experimental.pallas import mosaic_gpu as plgpu


def barrier(axis: str, interpret: plgpu.InterpretGPUParams | None, warpgroups: int = 1) -> Any:
    """Return the scratch that `wait` needs: a barrier in the interpreter, nothing on a GPU.

    Args:
        axis: of the cluster.
        interpret: see `dispatch.interpreter`.
        warpgroups: of a thread block.
    """
    if interpret is None:
        return None
    return plgpu.ClusterBarrier(collective_axes=(axis,), num_arrivals=warpgroups)


def wait(barrier) -> None:
    """Wait for all threads of the cluster; then what they wrote to global memory can be read.

    Every warpgroup of every thread block has to call it. On a GPU by instructions that Mosaic does
    not have: a `ClusterBarrier` orders shared memory only.
    """
    if barrier is not None:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return

    @plgpu.inline_mgpu()
    def arrive_and_wait(_):
        inline_ptx(
            "barrier.cluster.arrive.release.aligned;", has_side_effects=True, convergent=True
        )
        inline_ptx("barrier.cluster.wait.acquire.aligned;", has_side_effects=True, convergent=True)

    arrive_and_wait()
