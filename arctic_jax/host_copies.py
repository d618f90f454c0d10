"""From an array on the devices to one on the host, whichever memory the program wrote it to.

A program can write a result into the host's pinned memory itself; then only waiting is left. Other
results are transferred after it.
"""

import ctypes

import numpy as np
from jax import Array


def start(array: Array) -> None:
    """Start to transfer an array that `finish` will be called for."""
    if not _is_pinned(array):
        array.copy_to_host_async()


def finish(array: Array) -> np.ndarray:
    """Wait for the array, the same on all its devices, and return it; not to be written to.

    What is in pinned memory is read at its address: `np.asarray` would return a view of it, whose
    hold on the memory jax 0.11 releases at any later time, also when the array is long gone. Then
    it writes to memory that is somebody else's, or the process ends: "Attempting to decrease
    reference on a buffer with zero reference count".
    """
    if not _is_pinned(array):
        return np.asarray(array)
    mine = array.addressable_data(0).block_until_ready()
    data = (ctypes.c_char * mine.nbytes).from_address(mine.unsafe_buffer_pointer())
    return np.frombuffer(data, mine.dtype).reshape(mine.shape).copy()


def _is_pinned(array: Array) -> bool:
    return array.sharding.memory_kind == "pinned_host"
