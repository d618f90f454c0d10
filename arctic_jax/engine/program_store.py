"""Compiled programs on disk, so that a second start neither traces nor compiles. Engine start only.

JAX's own compilation cache saves XLA's work but not the tracing and lowering in Python, which take
longer for many layers with Pallas kernels. A program is found by everything that it depends on: the
sources of this package, the versions, the hardware, and what its owner names.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.stages import Compiled

from arctic_jax.loading import hub

logger = logging.getLogger(__name__)

UNUSED_DAYS = 30
ABOVE = frozenset({"serving", "training"})
"""Folders that the engine may not import (the layers in `pyproject.toml` say so): no program
changes with them."""


def default_directory() -> Path | None:
    """Return where programs are kept; `None` if the user lets JAX keep them.

    What comes from JAX's cache cannot be kept a second time: on a CPU such a program loads, and
    then misses its functions.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return None
    return hub.cache_directory() / "programs"


class ProgramStore:
    """Programs of one owner in one environment.

    The files are pickles: the directory must belong to the user alone, as it does when it is made
    here.

    Args:
        directory: where the files are; `None` to keep nothing.
        devices: those the programs run on.
        owner: whatever the programs depend on beside the environment, with a telling `repr`.
    """

    def __init__(self, directory: Path | None, devices: Sequence[Any], *owner: object) -> None:
        self._directory = directory
        self._devices = tuple(devices)
        self._owner = repr((environment(self._devices), owner))
        if directory is not None and directory.is_dir():
            _remove_unused(directory)

    def load(self, name: object, arguments: Any, results: Any) -> Compiled | None:
        """Return the program of that name, or `None`.

        Args:
            name: with a telling `repr`.
            arguments: a pytree like the tuple of its arguments.
            results: a pytree like its result.
        """
        path = self._path(name)
        if path is None or not path.exists():
            return None
        trees = jax.tree.structure((arguments, {})), jax.tree.structure(results)
        try:
            serialized = pickle.loads(path.read_bytes())
            program = deserialize_and_load(serialized, *trees, execution_devices=self._devices)
            os.utime(path)  # see `_remove_unused`
        except Exception as error:  # a damaged file, or one of an XLA that was built otherwise
            logger.warning("%s cannot be used and is made anew: %s", path, error)
            return None
        return program

    def save(self, name: object, program: Compiled) -> None:
        """Keep a program; if that cannot be done the next start compiles it again."""
        path = self._path(name)
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            serialized, _, _ = serialize(program)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(pickle.dumps(serialized))
            os.replace(file.name, path)  # another process may read or write the same program
        except Exception as error:
            logger.warning("a program could not be kept in %s: %s", path.parent, error)

    def _path(self, name: object) -> Path | None:
        if self._directory is None:
            return None
        digest = hashlib.sha256(f"{self._owner} {name!r}".encode()).hexdigest()
        return self._directory / f"{digest}.program"


def versions() -> tuple[object, ...]:
    """Return the digest of the sources that programs depend on, and the versions of libraries."""
    sources = hashlib.sha256()
    package = Path(__file__).parents[1]
    for folder, _, names in sorted(package.walk(follow_symlinks=True)):
        if not ABOVE.isdisjoint(folder.relative_to(package).parts):
            continue
        for name in sorted(name for name in names if name.endswith(".py")):
            sources.update((folder / name).read_bytes())
    libraries = [(name, metadata.version(name)) for name in ("jax", "jaxlib", "flax")]
    return sources.hexdigest(), libraries


def environment(devices: Sequence[Any]) -> tuple[object, ...]:
    """Return what programs, and their speed, depend on, whoever makes them."""
    client = devices[0].client
    return (
        *versions(),
        [(device.id, device.device_kind, device.process_index) for device in devices],
        client.process_index(),
        client.platform_version,
        _processor() if client.platform == "cpu" else None,
        os.environ.get("XLA_FLAGS"),
        jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.jax_default_matmul_precision,
        jax.config.read("jax_disable_most_optimizations"),
    )


def _processor() -> tuple[str, ...]:
    """Return what machine code for this processor may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return tuple(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})
    )


def _remove_unused(directory: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in directory.iterdir():
        with contextlib.suppress(OSError):  # another process has removed it
            if path.stat().st_mtime < oldest:
                path.unlink()
