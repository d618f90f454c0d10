"""A directory of safetensors files as a `Checkpoint`. Host only; opened files stay mapped, unread.

The directory holds `model.safetensors`, or `model.safetensors.index.json` with the shards that it
names, as Hugging Face writes them. The library checks the files and their headers; the numbers are
read here, because the library's reads do not get faster with threads.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from arctic_jax.errors import CheckpointError, UnsupportedModelError
from arctic_jax.weights import ALL_ROWS

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Integer buffers (position_ids and the like) that some exporters leave beside the weights.
_BUFFERS = {"I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
_LENGTH = struct.Struct("<Q")


class SafetensorsCheckpoint:
    """See `arctic_jax.weights.Checkpoint`; `read` returns the dtype that the file holds.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors; the message names it.
        UnsupportedModelError: a tensor has a dtype other than `DTYPES`; the message names both.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files: dict[str, Any] = {}
        self._offsets: dict[str, dict[str, int]] = {}
        self._where: dict[str, str] = {}
        index = self.directory / INDEX
        if (self.directory / SINGLE).is_file():
            self._where = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif index.is_file():
            self._where = _read_index(index)
            for file in sorted(set(self._where.values())):
                held = set(self._open(file).keys())
                for name, where in self._where.items():
                    if where == file and name not in held:
                        raise CheckpointError(f"{self.directory / file} lacks {name!r} of {INDEX}")
        else:
            raise CheckpointError(f"{self.directory} has neither {SINGLE} nor {INDEX}")
        for name in self._where:
            dtype = self._slice(name).get_dtype()
            if dtype not in DTYPES | _BUFFERS:
                raise UnsupportedModelError(
                    f"tensor {name!r} has dtype {dtype}, not one of {', '.join(DTYPES)}"
                )

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def read(
        self, name: str, rows: slice = ALL_ROWS, columns: slice = ALL_ROWS
    ) -> np.ndarray[Any, Any]:
        """Read `tensor[rows]`, or `tensor[rows, columns]` of a matrix, and nothing else."""
        part = self._slice(name)  # which the library has checked against the file's size
        file = self._where[name]
        tensor = np.memmap(
            self.directory / file,
            (DTYPES | _BUFFERS)[part.get_dtype()],
            "r",
            offset=self._offsets[file][name],
            shape=tuple(part.get_shape()),
        )
        return np.asarray(tensor[rows] if columns == ALL_ROWS else tensor[rows, columns])

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}")
        return self._files[self._where[name]].get_slice(name)

    def _open(self, file: str) -> Any:
        path = self.directory / file
        try:
            self._files[file] = safe_open(path, framework="numpy")
            self._offsets[file] = _offsets(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        return self._files[file]


def _offsets(path: Path) -> dict[str, int]:
    """Where each tensor begins: behind the header's length, the header, and other tensors."""
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    begin = _LENGTH.size + length
    return {name: begin + tensor["data_offsets"][0] for name, tensor in header.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text("utf-8"))["weight_map"]
        files = set(where.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {error!r}") from error
    for file in files:
        # An index is input from elsewhere: it names files beside it, never a path.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} names {file!r}, which is not a file name")
    return where
