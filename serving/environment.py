"""Where a figure was measured: versions, devices, memory, folders. For `bench` and `env`."""

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors", "gguf")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of what it stands on."""
    import arctic_jax

    found = {"python": platform.python_version(), "arctic_jax": arctic_jax.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> list[dict[str, Any]]:
    """Return JAX's devices with their memory in bytes where the backend tells it."""
    import jax

    rows = []
    for device in jax.devices():
        memory = device.memory_stats() or {}
        row = {"id": device.id, "platform": device.platform, "kind": device.device_kind}
        rows.append(row | {k: memory[k] for k in ("bytes_limit", "bytes_in_use") if k in memory})
    return rows


def host() -> dict[str, Any]:
    """Return the operating system, the processor, the cores this process may use, the memory."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages,
    }


def folders() -> dict[str, str]:
    """Return the folders in which downloads and compiled programs are kept."""
    import jax
    from huggingface_hub import constants

    from arctic_jax.engine import program_store

    compiled = jax.config.jax_compilation_cache_dir or program_store.default_directory()
    return {"hub": constants.HF_HUB_CACHE, "compiled programs": str(compiled)}


def record() -> dict[str, Any]:
    """Return what a committed figure needs beside it: date, command, versions, devices, host."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "devices": devices(),
        "host": host(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
