"""The memory maps of this process, which XLA's programs for CPUs take. Engine start only.

Such a program takes four of Linux's memory maps for each of its kernels, some six hundred in all
for a model of 30 layers. XLA does not look whether it gets them.
"""

import errno
from pathlib import Path

LIMIT = Path("/proc/sys/vm/max_map_count")
MAPS = Path("/proc/self/maps")
USABLE = 0.75
"""Of the memory maps that a process may have: XLA's threads each ask for a thousand meanwhile."""


def in_use() -> int:
    """Return how many this process has; 0 where the system does not say."""
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0


def check(platform: str) -> None:
    """Raise an error where XLA, for that platform, would end the process: a segmentation fault.

    Raises:
        OSError: nearly as many are in use as a process may have; the message holds the numbers.
    """
    if platform != "cpu" or not LIMIT.exists():
        return
    most, used = int(LIMIT.read_text()), in_use()
    if used > USABLE * most:
        raise OSError(
            errno.ENOMEM,
            f"the programs of this process's engines use {used} memory maps, and it may have {most}"
            " (vm.max_map_count): delete other engines, set a smaller max_num_seqs, which means "
            "fewer programs, or have root run `sysctl -w vm.max_map_count=1000000`",
        )
