"""What the `cases.py` of every kernel offers to the tests and the benchmark, and what they share.

`tests/kernels/test_kernels.py` and `benchmarks/kernels.py` find the folders, and read of each:

- `CASES`: the named shapes, each a `Case` with the operation's own fields.
- `TOLERANCE`: by dtype, the largest difference in one element, relative to 1 + |expected|.
- `inputs(case, seed, poison)`: the positional and the keyword arguments of the operation; with
  `poison`, what must not be read as data holds it.
- `expected(case, arguments, keywords)`: the output or outputs in float64, from a formula in numpy;
  NaN where anything will do.
- `comparable(case, output, arguments)`: a tuple of what a call returned, in float64; an
  `AssertionError` for what is wrong whatever the formula says. Often it is `finite`.
- `following(arguments, output)`: the arguments of the next call, which depend on the output, so
  that calls run one after another.
- `cost(case)`: the bytes that must be moved and the floating-point operations that must be done.
"""

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A named shape, which each kernel extends by its own fields.

    Names stay: results refer to them.

    Attributes:
        name: unique among the kernel's.
        tags: words: "ci" runs in the tests; "gpu" is too slow for an interpreter, and runs on a
            GPU; "bench" is measured.
        dtype: of the arrays, and the key of the tolerance.
        race_detection: small enough for the interpreter to look for races.
    """

    name: str
    _: dataclasses.KW_ONLY
    tags: str = "ci"
    dtype: str = "bfloat16"
    race_detection: bool = False


def finite(case: Case, output: jax.Array | tuple, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return the output or outputs as float64; all of it must be finite."""
    del arguments
    arrays = tuple(np.asarray(array).astype(np.float64) for array in jax.tree.leaves(output))
    if not all(np.isfinite(array).all() for array in arrays):
        raise AssertionError(f"{case.name}: not finite")
    return arrays
