"""What compiled programs cost a process beside time."""

import gc
from pathlib import Path

import pytest
from tiny_engine import make_engine

from arctic_jax.engine import programs

MAPS = Path("/proc/self/maps")


def test_too_many_programs_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a limit of memory maps; XLA ends the process there."""
    monkeypatch.setattr(programs, "MAPS_IN_USE", 0)
    if not MAPS.exists():
        make_engine()
        return
    with pytest.raises(OSError, match=r"use \d+ memory maps, and it may have \d+"):
        make_engine()
    programs.check_memory_maps("gpu")


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux counts memory maps")
def test_an_engine_gives_its_memory_maps_back() -> None:
    def count() -> int:
        gc.collect()
        return len(MAPS.read_bytes().splitlines())

    make_engine()  # keeps what all engines share
    before = count()
    engine = make_engine()
    with_engine = count()
    assert with_engine > before + 500
    del engine
    assert count() < before + 0.1 * (with_engine - before)
