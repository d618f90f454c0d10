"""Every kernel folder: implementation by case, against the float64 formula of its `cases.py`.

A folder that appears under `pallas_kernels/` is found here; there is nothing to register.
"""

import functools
import importlib
import pathlib

import jax
import numpy as np
import pytest

from arctic_jax import pallas_kernels

ROOT = pathlib.Path(next(iter(pallas_kernels.__path__)))
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("*/cases.py"))


def modules(operation):
    package = f"{pallas_kernels.__name__}.{operation}"
    op = importlib.import_module(f"{package}.op")
    return getattr(op, operation), op, importlib.import_module(f"{package}.cases")


CASES = [
    pytest.param(operation, case, id=f"{operation}-{case.name}")
    for operation in OPERATIONS
    for case in modules(operation)[2].CASES
    if "ci" in case.tags
]


def check(operation, case, implementation, poison):
    """Run one case and compare it with the formula."""
    function, _, cases = modules(operation)
    arguments, keywords = cases.inputs(case, seed=1, poison=poison)
    call = functools.partial(function, **keywords, implementation=implementation)
    # A new function object, since what is traced depends on the interpreter being on.
    output = jax.block_until_ready(jax.jit(lambda *a: call(*a))(*arguments))
    want = cases.expected(case, arguments, keywords)
    want = want if isinstance(want, tuple) else (want,)
    for actual, wanted in zip(cases.comparable(case, output, arguments), want, strict=True):
        defined = ~np.isnan(wanted)
        error = np.abs(actual - wanted)[defined] / (1 + np.abs(wanted[defined]))
        assert error.max(initial=0.0) <= cases.TOLERANCE[case.dtype], f"{error.max()=}"


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_xla_is_the_formula(operation, case):
    # The specification multiplies weights of 0 with the values past a sequence's end, which are
    # old but finite numbers in a real cache. So they are large here, and NaN for the kernels.
    check(operation, case, "xla", poison=1e4)


def test_every_operation_has_cases():
    assert sorted(path.parent.name for path in ROOT.glob("*/op.py")) == OPERATIONS
