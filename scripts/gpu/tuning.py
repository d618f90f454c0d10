"""What the scripts that look for a kernel's fastest sizes share: they build, time, check and write.

A time is that of the device alone, of calls that follow each other (`benchmarks/kernels.py`).
"""

import argparse
import concurrent.futures
import contextlib
import faulthandler
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# For what the scripts import after this module, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from benchmarks import kernels

HANGS_S = 40  # a measurement takes less than 1
BEGIN = time.monotonic()


def parser(doc: str, most: int, limit: float) -> argparse.ArgumentParser:
    """Return a parser of the options that all scripts have; `doc` is a script's own."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--most", type=int, default=most, help="configs a case")
    parser.add_argument("--checked", type=int, default=2, help="configs a case, the fastest ones")
    parser.add_argument("--limit", type=float, default=limit, help="seconds in all")
    parser.add_argument("--threads", type=int, default=14, help="that compile at once")
    parser.add_argument("--lower", action="store_true", help="lower all configs, time none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def lower(cases: ModuleType, case: Any, calls: Iterable[Callable]) -> None:
    """Lower functions of a case's arguments for CUDA, on any machine."""
    arguments = jax.eval_shape(lambda: cases.inputs(case)[0])
    for call in calls:
        jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))


def late(options: argparse.Namespace) -> bool:
    """Return whether the time limit is over."""
    return time.monotonic() > BEGIN + options.limit


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """End the process if what is inside hangs: a kernel cannot be stopped."""
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def tune(
    cases: ModuleType,
    case: Any,
    others: dict[str, Callable],
    candidates: dict[Any, Callable],
    count: int,
    copies: int,
    options: argparse.Namespace,
) -> dict:
    """Compile all, time one after the other, and compare the fastest configs with XLA.

    `candidates` are the kernel with each config; `others` are timed beside it, "xla" being what its
    results should be. Programs are of `count` calls, which go round `copies` sets of arguments.
    """
    make = jax.jit(lambda: [cases.inputs(case, seed)[0] for seed in range(copies)]).lower()
    calls = others | candidates

    def attempt(figure: str, function: Callable, *arguments) -> dict:
        if late(options):
            return {"error": "no time left"}
        try:
            return {figure: function(*arguments)}
        except Exception as error:  # one config that fails must not cost the others
            return {"error": repr(error)[:300]}

    def build(call: Callable) -> Callable:
        return kernels.chain(call, cases.following, count).lower(make.out_info).compile()

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        making = pool.submit(make.compile)
        built = list(pool.map(functools.partial(attempt, "program", build), calls.values()))
        sets = making.result()
    compiling = time.monotonic() - begin

    @watched()
    def microseconds(program: Callable) -> float:
        seconds, _ = kernels.seconds_per_launch(program, jax.block_until_ready(sets()))
        return seconds / count * 1e6

    @watched()
    def difference(call: Callable) -> float:
        arguments = sets()[0]
        result, wanted = (
            np.asarray(jax.jit(function)(*arguments)).astype(np.float32)
            for function in (call, others["xla"])
        )
        return float((np.abs(result - wanted) / (1 + np.abs(wanted))).max())

    rows = {}
    for key, row in zip(calls, built, strict=True):
        print(f"{case.name}: {key}", file=sys.stderr, flush=True)
        if "program" in row:
            row = attempt("us", microseconds, row["program"])
        rows[key] = {"config": {} if key in others else vars(key)} | row
    fastest = sorted(candidates, key=lambda config: rows[config].get("us", math.inf))
    for config in fastest[: options.checked]:
        if "us" in (row := rows[config]):
            row |= {"difference": None} | attempt("difference", difference, candidates[config])
    configs = [rows.pop(config) for config in fastest]
    return rows | {"configs": configs, "compile_s": compiling}


def sizes(row: dict) -> str:
    """Return a row's config, as a table has it."""
    return " ".join(f"{name} {value}" for name, value in row["config"].items())


def line(row: dict, xla_us: float, rate: str = "") -> str:
    """Return the table line of a config that was timed."""
    difference = row.get("difference")
    checked = "" if difference is None else f"  difference {difference:.1e}"
    return f"  {row['us']:6.1f} us {xla_us / row['us']:5.2f} x{rate}  {sizes(row)}{checked}"


def write(path: Path, **results: list[dict]) -> None:
    """Write what was measured so far, with what is needed to repeat it."""
    script, *arguments = sys.argv
    document = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": f"python scripts/gpu/{Path(script).name} " + " ".join(arguments),
    }
    path.write_text(json.dumps(document | results, indent=1) + "\n")
