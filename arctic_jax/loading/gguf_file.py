"""The container: a GGUF file's metadata, and where its tensors lie. Host only; reads the header.

`gguf.GGUFReader` keeps a numpy array for every element of every list (seconds for a vocabulary)
and trusts the lengths that a file states. A checkpoint is input from elsewhere, so here each
length is checked against the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from arctic_jax.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape in numpy's order, how it is quantized, and where its bytes are."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, i.e. of the last dimension."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size


class GGUFFile:
    """`metadata` by key, `tensors` by name, and `rows()` of raw bytes, mapped from the file.

    Raises:
        CheckpointError: the file is not GGUF, is truncated, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        try:
            self._parse()
        except _DamagedError as error:
            raise CheckpointError(f"{self.path} is not a whole GGUF file: {error}") from error

    def rows(self, name: str) -> np.ndarray[Any, Any]:
        """View a tensor's bytes as `[rows, row_bytes]`, nothing read yet."""
        info = self.tensors[name]
        rows = math.prod(info.shape[:-1])
        end = info.offset + rows * info.row_bytes
        return self._bytes[info.offset : end].reshape(rows, info.row_bytes)

    def _parse(self) -> None:
        cursor = _Cursor(memoryview(self._bytes))
        if bytes(cursor.take(4)) != _MAGIC:
            raise _DamagedError("it does not begin with 'GGUF'")
        version = cursor.integer("<I")
        if version not in _VERSIONS:
            raise _DamagedError(f"version {version} is not one of {_VERSIONS} (little-endian)")
        num_tensors, num_keys = cursor.integer("<Q"), cursor.integer("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            if key in self.metadata:
                raise _DamagedError(f"key {key!r} occurs twice")
            self.metadata[key] = cursor.value()
        infos = [cursor.tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment {alignment!r} is not a power of two")
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in infos:
            info = TensorInfo(info.shape, info.type, start + info.offset)
            end = info.offset + math.prod(info.shape[:-1]) * info.row_bytes
            if name in self.tensors:
                raise _DamagedError(f"tensor {name!r} occurs twice")
            if end > len(self._bytes):
                raise _DamagedError(
                    f"tensor {name!r} ends at byte {end}, the file at {len(self._bytes)}"
                )
            self.tensors[name] = info


class _DamagedError(Exception):
    """What is wrong, without the file's name."""


class _Cursor:
    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.position = 0

    def take(self, count: int) -> memoryview:
        if count > len(self._view) - self.position:
            raise _DamagedError(
                f"{count} bytes wanted at byte {self.position} of {len(self._view)}"
            )
        self.position += count
        return self._view[self.position - count : self.position]

    def integer(self, code: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        at = self.position
        try:
            return str(self.take(self.integer("<Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedError(f"the string at byte {at} is not UTF-8") from error

    def value(self) -> Any:
        kind = self._kind()
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self._scalars(kind, 1)[0]
        kind, count = self._kind(), self.integer("<Q")
        if kind == GGUFValueType.ARRAY:
            raise _DamagedError("a list of lists")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]  # ends with the file, whatever it says
        return self._scalars(kind, count)

    def tensor_info(self) -> tuple[str, TensorInfo]:
        name = self.string()
        dimensions = self.integer("<I")
        if not 1 <= dimensions <= 4:
            raise _DamagedError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.integer("<Q") for _ in range(dimensions))[::-1]
        number, offset = self.integer("<I"), self.integer("<Q")
        try:
            info = TensorInfo(shape, GGMLQuantizationType(number), offset)
        except ValueError as error:
            raise _DamagedError(f"tensor {name!r} has the unknown type {number}") from error
        block = GGML_QUANT_SIZES[info.type][0]
        if shape[-1] % block or not all(shape):
            raise _DamagedError(f"tensor {name!r} of {info.type.name} has shape {shape}")
        return name, info

    def _kind(self) -> GGUFValueType:
        number = self.integer("<I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise _DamagedError(f"unknown value type {number} at byte {self.position}") from error

    def _scalars(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
