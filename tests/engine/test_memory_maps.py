"""What compiled programs cost a process beside time."""

import gc

import pytest
from tiny_engine import make_engine

from arctic_jax.engine import memory_maps


def test_too_many_programs_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a limit of memory maps; XLA ends the process there."""
    monkeypatch.setattr(memory_maps, "USABLE", 0)
    if not memory_maps.LIMIT.exists():
        make_engine()
        return
    with pytest.raises(OSError, match=r"use \d+ memory maps, and it may have \d+"):
        make_engine()
    memory_maps.check("gpu")


@pytest.mark.skipif(not memory_maps.in_use(), reason="only Linux counts memory maps")
def test_an_engine_gives_its_memory_maps_back() -> None:
    def count() -> int:
        gc.collect()
        return memory_maps.in_use()

    make_engine()  # keeps what all engines share
    before = count()
    engine = make_engine()
    with_engine = count()
    assert with_engine > before + 500
    del engine
    assert count() < before + 0.1 * (with_engine - before)
