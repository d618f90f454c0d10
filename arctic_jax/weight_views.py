"""Parts of placed weights that share their memory. Engine start only.

A layout that splits the weights over more devices needs, on each device, a range of the rows that a
coarser layout has there: parameters are stored with their split dimension first, so this is one
piece of memory. JAX has no arrays that are parts of others; DLPack has, by the address of their
first element.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.dlpack
from jax.sharding import NamedSharding

ALIGNMENT = {"cpu": 64, "gpu": 256}
"""Bytes. What XLA asks of an argument on a CPU; on a GPU what our kernels' bulk copies ask."""


def rows(
    array: jax.Array,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    begins: Mapping[Any, int],
) -> tuple[jax.Array, int]:
    """Return rows of each device's part of an array, from `begins` on; and bytes copied.

    The result does not keep the memory alive: the caller holds `array` as long as it is used. No
    bytes are copied unless the platform has no such views, or a part begins at an address that
    programs do not take.

    Args:
        array: split, if at all, in its first dimension.
        shape: of the result, global; so many rows are taken as a device has of it.
        sharding: of the result.
        begins: the first of them, in the device's part of `array`.
    """
    count = sharding.shard_shape(shape)[0]
    parts, copied = [], 0
    for shard in array.addressable_shards:
        begin = begins[shard.device]
        view = _View(shard.data, begin, begin + count)
        if view.aligned:
            parts.append(jax.dlpack.from_dlpack(view))
        else:
            part = shard.data[begin : begin + count]
            parts.append(part)
            copied += part.nbytes
    return jax.make_array_from_single_device_arrays(shape, sharding, parts), copied


class _View:
    """Rows of an array on one device, for DLPack's importers (protocol version 0)."""

    def __init__(self, array: jax.Array, start: int, stop: int) -> None:
        self._dtype = _DTYPES.get(array.dtype.name)
        (self._device,) = array.devices()
        self._shape = (stop - start, *array.shape[1:])
        row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
        array.block_until_ready()
        self._address = array.unsafe_buffer_pointer() + start * row_bytes

    @property
    def aligned(self) -> bool:
        """Whether programs take an argument at this address; else it cannot be a view."""
        alignment = ALIGNMENT.get(self._device.platform)
        return bool(alignment and self._dtype and self._address % alignment == 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind = {"cpu": _CPU, "gpu": _CUDA}[self._device.platform]
        return kind, self._device.local_hardware_id

    def __dlpack__(self, **_: Any) -> object:
        shape = (ctypes.c_int64 * len(self._shape))(*self._shape)
        tensor = _ManagedTensor()
        tensor.data = self._address
        tensor.device_kind, tensor.device_id = self.__dlpack_device__()
        tensor.num_dimensions = len(self._shape)
        tensor.dtype_code, tensor.dtype_bits = self._dtype or (0, 0)
        tensor.dtype_lanes = 1
        tensor.shape = shape
        tensor.deleter = _do_nothing
        _exported.append((tensor, shape))
        return _new_capsule(ctypes.addressof(tensor), b"dltensor", None)


# DLPack's header in C: `DLManagedTensor` with the `DLTensor` at its beginning written out.
class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_kind", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("num_dimensions", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_CPU, _CUDA = 1, 2
_DTYPES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "int8": (0, 8)}

# The importer calls the deleter at a time of its choosing, perhaps when the interpreter is gone: a
# function of C that does nothing, and descriptions (not the memory) that are never freed.
_do_nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
_exported: list[tuple[_ManagedTensor, Any]] = []

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
