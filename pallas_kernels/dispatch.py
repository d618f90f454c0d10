"""Which implementation of an operation runs here. Pure; decided while a program is traced.

Every operation has the implementation `"xla"` (its `reference.py`, which runs anywhere) and may
have `"mosaic_gpu"` (a Pallas kernel for Hopper). Nothing falls back silently: `None` means the best
for the default backend, a name means that one or an error with the reason.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("xla", "mosaic_gpu")

_interpreter: contextvars.ContextVar[plgpu.InterpretGPUParams | None] = contextvars.ContextVar(
    "mosaic_gpu_interpreter", default=None
)

_for_hopper: contextvars.ContextVar[bool] = contextvars.ContextVar("for_hopper", default=False)


@contextlib.contextmanager
def lowering_for_hopper(has_kernels: bool = True) -> Iterator[None]:
    """Choose inside as on a Hopper GPU (if `has_kernels`), though programs are only lowered."""
    token = _for_hopper.set(has_kernels)
    try:
        yield
    finally:
        _for_hopper.reset(token)


@contextlib.contextmanager
def interpret(*, detect_races: bool = False) -> Iterator[None]:
    """Run the Mosaic GPU kernels traced inside in JAX's interpreter, on any back end; for tests.

    Every warpgroup blocks a thread of XLA's CPU pool while it waits, so on a machine of few cores
    set `jax_num_cpu_devices` above 4, or a kernel of three warpgroups waits for ever.
    """
    token = _interpreter.set(plgpu.InterpretGPUParams(detect_races=detect_races))
    try:
        yield
    finally:
        _interpreter.reset(token)


def interpreter() -> plgpu.InterpretGPUParams | None:
    """Return the parameters of the interpreter when kernels are to run in it, else `None`."""
    return _interpreter.get()


def mosaic_gpu_unavailable() -> str | None:
    """Return why Mosaic GPU kernels cannot run on the default backend, or `None` if they can."""
    if interpreter() is not None or _for_hopper.get():
        return None
    if jax.default_backend() != "gpu":
        return f"the default backend is {jax.default_backend()!r}, not 'gpu'"
    capability = getattr(jax.devices()[0], "compute_capability", "0.0")
    if capability != "9.0":
        return f"the GPU has compute capability {capability}, the kernels are written for 9.0"
    return None


def resolve(operation: str, implementation: str | None, preferred: str) -> str:
    """Return the implementation of `operation` to use.

    Args:
        operation: the operation's name, for the log and for errors.
        implementation: a name of `IMPLEMENTATIONS`, or `None` for the best one.
        preferred: what measured fastest on an H200; used there when `implementation` is `None`.

    Raises:
        ValueError: the name is unknown, or the implementation cannot run here.
    """
    if implementation is None:
        chosen = "xla" if mosaic_gpu_unavailable() else preferred
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: {implementation=} is not one of {IMPLEMENTATIONS}")
    elif implementation == "mosaic_gpu" and (reason := mosaic_gpu_unavailable()):
        raise ValueError(f"{operation}: implementation='mosaic_gpu' cannot run here: {reason}")
    else:
        chosen = implementation
    _log_once(operation, chosen)
    return chosen


@functools.cache
def _log_once(operation: str, chosen: str) -> None:
    logger.info("%s uses %s", operation, chosen)
