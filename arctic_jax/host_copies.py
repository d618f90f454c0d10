"""From an array on the devices to one on the host, whichever memory the program wrote it to.

A program can write a result into the host's pinned memory itself; then only waiting is left. Other
results are transferred after it.
"""

import atexit
import contextlib
import ctypes
import threading
import time

import numpy as np
from jax import Array

_MOST = 64
_unfinished: dict[int, Array] = {}
"""The latest arrays on their way, the first one first: of some, nobody asks for the end."""
_lock = threading.Lock()


def start(array: Array) -> None:
    """Start to transfer an array that `finish` will be called for."""
    if not _is_pinned(array):
        with _lock:
            _unfinished[id(array)] = array
            if len(_unfinished) > _MOST:
                del _unfinished[next(iter(_unfinished))]
        array.copy_to_host_async()


@atexit.register
def _finish_all() -> None:
    """Let a process end in the middle of a step.

    A thread of jax 0.11 that ends a transfer asks for the interpreter's lock, and the process is
    aborted if the interpreter is being taken down by then.
    """
    arrays = list(_unfinished.values())
    for array in arrays:
        with contextlib.suppress(Exception):  # what a broken device says of it helps nobody now
            finish(array)
    if arrays:
        time.sleep(0.05)  # without the lock: those threads are about to ask for it


def finish(array: Array) -> np.ndarray:
    """Wait for the array, the same on all its devices, and return it; not to be written to.

    What is in pinned memory is read at its address: `np.asarray` would return a view of it, whose
    hold on the memory jax 0.11 releases at any later time, also when the array is long gone. Then
    it writes to memory that is somebody else's, or the process ends: "Attempting to decrease
    reference on a buffer with zero reference count".
    """
    if not _is_pinned(array):
        with _lock:
            _unfinished.pop(id(array), None)
        return np.asarray(array)
    mine = array.addressable_data(0).block_until_ready()
    data = (ctypes.c_char * mine.nbytes).from_address(mine.unsafe_buffer_pointer())
    return np.frombuffer(data, mine.dtype).reshape(mine.shape).copy()


def is_ready(array: Array) -> bool:
    """Return whether the array has been computed."""
    return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]


def _is_pinned(array: Array) -> bool:
    return array.sharding.memory_kind == "pinned_host"
