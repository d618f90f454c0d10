"""Every kernel folder: implementation by case, against the float64 formula of its `cases.py`.

Four tiers: the XLA implementation on any back end, the body of the Mosaic kernel in the GPU
interpreter, the Mosaic kernel lowered for CUDA without a GPU, and (marked `gpu`) the kernel itself.
And `benchmarks/kernels.py` measures each, by calls that depend on each other.
A folder that appears under `pallas_kernels/` is found here; there is nothing to register.
"""

import functools
import importlib
import pathlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest

from arctic_jax import pallas_kernels
from arctic_jax.pallas_kernels import dispatch

ROOT = pathlib.Path(next(iter(pallas_kernels.__path__)))
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("*/cases.py"))


def modules(operation):
    package = f"{pallas_kernels.__name__}.{operation}"
    op = importlib.import_module(f"{package}.op")
    return getattr(op, operation), op, importlib.import_module(f"{package}.cases")


def unsupported(operation, case):
    """Why the Mosaic kernel does not take a case, or None."""
    _, op, cases = modules(operation)
    keywords = {}

    def arrays():
        arguments, more = cases.inputs(case)
        keywords.update(more)
        return arguments

    return op.mosaic_gpu_unsupported(*jax.eval_shape(arrays), **keywords)


def tagged(*tags):
    return [
        pytest.param(operation, case, id=f"{operation}-{case.name}")
        for operation in OPERATIONS
        for case in modules(operation)[2].CASES
        if set(case.tags.split()) & set(tags)
    ]


CASES = tagged("ci")


def check(operation, case, implementation, poison, seed=1):
    """Run one case and compare it with the formula."""
    function, _, cases = modules(operation)
    call = functools.partial(function, implementation=implementation)
    kernel_checks.check(cases, case, call, seed, poison)


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_xla_is_the_formula(operation, case):
    # The specification multiplies weights of 0 with the values past a sequence's end, which are
    # old but finite numbers in a real cache. So they are large here, and NaN for the kernels.
    check(operation, case, "xla", poison=1e4)


# The padding rows of a wgmma hold whatever the memory held, NaN in the interpreter.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("operation", "case"), CASES)
def test_mosaic_body_in_the_interpreter(operation, case, capsys):
    with kernel_checks.interpreted(capsys, case.race_detection):
        if unsupported(operation, case):
            with pytest.raises(ValueError, match="mosaic_gpu"):
                check(operation, case, "mosaic_gpu", poison=np.nan)
        else:
            check(operation, case, "mosaic_gpu", poison=np.nan)


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_mosaic_lowers_for_cuda(operation, case, monkeypatch):
    monkeypatch.setattr(dispatch, "mosaic_gpu_unavailable", lambda: None)
    if unsupported(operation, case):
        pytest.skip("goes to XLA")
    function, _, cases = modules(operation)
    call = functools.partial(function, implementation="mosaic_gpu")
    kernel_checks.check_lowers(cases, case, call)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("operation", "case"), tagged("ci", "gpu"))
def test_mosaic_on_the_gpu(operation, case, seed):
    if reason := dispatch.mosaic_gpu_unavailable():
        pytest.skip(reason)
    if not unsupported(operation, case):
        check(operation, case, "mosaic_gpu", poison=np.nan, seed=seed)


def test_every_operation_has_cases():
    # What needs several devices is tested by itself, in test_all_reduce.py.
    operations = {path.parent.name for path in ROOT.glob("*/op.py")}
    assert operations == {*OPERATIONS, "all_reduce"}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT.parent)
    return importlib.import_module("benchmarks.kernels")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_benchmark_measures_it(operation, bench, monkeypatch):
    monkeypatch.setattr(bench, "MOST_CHAINED", 3)
    monkeypatch.setattr(bench, "LONG_S", 0)  # no slope of many launches
    ceiling = {"bytes_per_s": 4e12, "flop_per_s": 7e14}
    _, _, cases = modules(operation)
    case = min(cases.CASES, key=cases.cost)  # of one operation it costs nothing at all
    with ThreadPoolExecutor(1) as pool:
        candidate = bench.Candidate(operation, case, "xla", pool)
        candidate.look()
        candidate.lengthen(ceiling, pool)
    (row,) = bench.measure([candidate], ["xla"], ceiling, profile=False)
    assert (row["operation"], row["case"], row["difference"]) == (operation, case.name, 0)
    assert 0 < row["us"] < 1e6
    assert bench.show(row).startswith(operation)


@pytest.mark.parametrize(("count", "ends"), [(1, [1, 0]), (2, [0, 2]), (5, [5, 3])])
def test_calls_of_a_chain_depend_on_each_other(count, ends, bench):
    """They go round the sets of arguments."""
    program = bench.chain(lambda x: x + 1, lambda arguments, output: (output,), count)
    assert [int(x) for (x,) in program([(jnp.int32(0),), (jnp.int32(0),)])] == ends
