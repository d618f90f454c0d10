"""`benchmarks/kernels.py`: it measures every operation, by calls that depend on each other."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from arctic_jax import pallas_kernels

OPERATIONS = sorted(p.parent.name for p in Path(pallas_kernels.__path__[0]).glob("*/cases.py"))
CEILING = {"bytes_per_s": 4e12, "flop_per_s": 7e14}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.kernels")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_measures(operation: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_CHAINED", 3)
    monkeypatch.setattr(kernels, "LONG_S", 0)  # no slope of many launches
    case = importlib.import_module(f"{pallas_kernels.__name__}.{operation}.cases").CASES[0]
    with ThreadPoolExecutor(1) as pool:
        candidate = kernels.Candidate(operation, case, "xla", CEILING, pool)
    (row,) = kernels.measure([candidate], ["xla"], CEILING, profile=False)
    assert (row["operation"], row["case"], row["difference"]) == (operation, case.name, 0)
    assert 0 < row["us"] < 1e6
    assert kernels.show(row).startswith(operation)


@pytest.mark.parametrize(("count", "ends"), [(1, [1, 0]), (2, [0, 2]), (5, [5, 3])])
def test_calls_of_a_chain_depend_on_each_other(count: int, ends: list[int], kernels: Any) -> None:
    """They go round the sets of arguments."""
    program = kernels.chain(lambda x: x + 1, lambda arguments, output: (output,), count)
    assert [int(x) for (x,) in program([(jnp.int32(0),), (jnp.int32(0),)])] == ends
