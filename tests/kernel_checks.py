"""What the tests of kernels share: a case compared with the formula, races, lowering for CUDA."""

import contextlib
import functools

import jax
import numpy as np

from arctic_jax.pallas_kernels import dispatch


def check(cases, case, call, seed=1, poison=None):
    """Run one case of a `cases.py` and compare it with the formula."""
    arguments, keywords = cases.inputs(case, seed=seed, poison=poison)
    # A new function object, since what is traced depends on the interpreter being on.
    output = jax.block_until_ready(jax.jit(lambda *a: call(*a, **keywords))(*arguments))
    want = cases.expected(case, arguments, keywords)
    want = want if isinstance(want, tuple) else (want,)
    for actual, wanted in zip(cases.comparable(case, output, arguments), want, strict=True):
        defined = ~np.isnan(wanted)
        error = np.abs(actual - wanted)[defined] / (1 + np.abs(wanted[defined]))
        assert error.max(initial=0.0) <= cases.TOLERANCE[case.dtype], f"{error.max()=}"


@contextlib.contextmanager
def interpreted(capsys, detect_races=True):
    """Run kernels in the GPU interpreter, and fail if it found a race."""
    with dispatch.interpret(detect_races=detect_races):
        yield dispatch.interpreter()
    assert "RACE DETECTED" not in capsys.readouterr().out  # a race is printed, not raised


def check_lowers(cases, case, call):
    """Lower one case for CUDA: it is a kernel of ours."""
    arguments, keywords = cases.inputs(case)
    traced = jax.jit(functools.partial(call, **keywords)).trace(*arguments)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
