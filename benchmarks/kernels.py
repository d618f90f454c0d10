"""Times every implementation of every operation on its `bench` cases, and checks the results.

    python benchmarks/kernels.py [--operations NAME …] [--filter TEXT] [--out FILE]

Prints device time, bandwidth or arithmetic rate, the fraction of what this GPU was measured to do
in the same run (a device-to-device copy, an 8192³ bf16 product), and the largest difference from
the XLA implementation. A call's time is that of the device alone (`seconds_per_launch`); the calls
go round several sets of inputs, together larger than the L2 cache where they are not tiny. A
call's `busy_us` is what its kernels take by a profile, those of XLA around ours included (what a
step computes once for all layers, such a call computes anew): where the time is several times that,
the host could not launch fast enough. With `--profile`, each kernel's time, too.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import importlib
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from arctic_jax import pallas_kernels

ROOT = pathlib.Path(next(iter(pallas_kernels.__path__)))
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("*/cases.py"))
L2_BYTES = 60e6
LONG_S = 0.02  # of a program: the host's share is less than a hundredth of that
CHAIN_S = 4e-4  # of a program: longer than its launch takes the host
MOST_CHAINED = 128  # calls in one program


def median_seconds(program, state, repeats: int = 7):
    """Return the median time of `state = program(state)` and the last state."""
    times = []
    state = jax.block_until_ready(program(state))
    for _ in range(repeats):
        begin = time.perf_counter()
        state = jax.block_until_ready(program(state))
        times.append(time.perf_counter() - begin)
    return statistics.median(times), state


def chain(function, following, count: int):
    """Return a program of `count` dependent calls, from sets of arguments to those that follow.

    XLA sees no further than one call: it would leave out outputs that the next call does not read,
    and make one kernel of several calls.
    """
    function = jax.jit(function)  # traced once

    def run(sets):
        output = None
        for i in range(count):
            arguments = sets[i % len(sets)]
            if output is not None:
                arguments = following(arguments, output)
            output = lax.optimization_barrier(function(*arguments))
            sets[i % len(sets)] = arguments
        sets[(count - 1) % len(sets)] = following(sets[(count - 1) % len(sets)], output)
        return sets

    return jax.jit(run, donate_argnums=0)


def seconds_per_launch(program, sets: list[tuple]) -> tuple[float, list[tuple]]:
    """Return device seconds of one launch of a `chain`, and the sets that come out.

    The programs are launched without waiting for each other, and each must be long enough for the
    host to stay ahead; the slope between few and many launches leaves out the first one's latency,
    which is nothing beside a program that takes long.
    """

    def launches(count, sets):
        for _ in range(count):
            sets = program(sets)
        return sets

    one, sets = median_seconds(program, sets, repeats=3)
    if one > LONG_S:
        return one, sets
    few, sets = median_seconds(functools.partial(launches, 2), sets)
    many, sets = median_seconds(functools.partial(launches, 12), sets)
    return (many - few) / 10, sets


def kernel_microseconds(function, arguments: tuple, calls: int = 4) -> dict[str, float]:
    """Return what one call spends in each kernel on the first GPU, by a profile."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([function(*arguments) for _ in range(calls)])
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    found = collections.Counter()
    for plane in profile.planes:
        if plane.name != "/device:GPU:0":
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    found[event.name] += event.duration_ns / calls / 1e3
    return dict(found.most_common())


def ceilings() -> dict[str, float]:
    """Return the measured bytes/s of a copy and FLOP/s of a large bf16 product."""
    on_gpu = jax.default_backend() == "gpu"
    x = jax.random.normal(jax.random.key(0), (1 << (29 if on_gpu else 24),), jnp.bfloat16)
    duplicate = jax.jit(jnp.copy)  # its input stays alive, so this is a copy in device memory
    times = []
    for count in (4, 24):
        program = lambda _, count=count: [duplicate(x) for _ in range(count)]
        times.append(median_seconds(program, None)[0])
    copy = (times[1] - times[0]) / 20
    moved, n, count = 2 * x.nbytes, 8192 if on_gpu else 1024, 8
    a = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16) / n**0.5
    b = jax.random.normal(jax.random.key(2), (n, n), jnp.bfloat16) / n**0.5
    products = chain(jnp.matmul, lambda arguments, output: (output, *arguments[1:]), count)
    seconds, _ = seconds_per_launch(products, [(a, b)])
    return {"bytes_per_s": moved / copy, "flop_per_s": 2 * n**3 * count / seconds}


class Candidate:
    """One implementation on one case, compiled by a pool of threads; inputs are not kept.

    Attributes:
        unsupported: why the implementation does not take the case, or `None`.
        call: a future of its compiled call.
        busy: found by `look`, seconds that one call's kernels take.
        chain: made by `lengthen`, a future of `count` compiled calls, whose inputs come from
            `copies` sets.
    """

    def __init__(
        self, operation: str, case: Any, implementation: str, pool: concurrent.futures.Executor
    ) -> None:
        package = f"{pallas_kernels.__name__}.{operation}"
        op = importlib.import_module(f"{package}.op")
        self.operation, self.case, self.implementation = operation, case, implementation
        self.cases = importlib.import_module(f"{package}.cases")
        self.unsupported = None
        arguments, keywords = self.cases.inputs(case)
        if implementation == "mosaic_gpu":
            self.unsupported = op.mosaic_gpu_unsupported(*arguments, **keywords)
        if self.unsupported is not None:
            return
        call = functools.partial(getattr(op, operation), **keywords, implementation=implementation)
        self._function = jax.jit(call)  # traced once, for one call and for the chain
        self._shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), arguments
        )
        self.call = pool.submit(lambda: self._function.lower(*self._shapes).compile())

    def look(self) -> None:
        """Run a call. Nothing is to be compiled meanwhile: XLA would try products on the GPU."""
        arguments, _ = self.cases.inputs(self.case)
        alone, output = median_seconds(lambda _: self.call.result()(*arguments), None, repeats=3)
        # By a profile where there is one: how long the host waits says little of a short call.
        self.busy = sum(self.kernels_us().values()) / 1e6 or alone
        self._is_in_place = isinstance(output, tuple)

    def lengthen(self, ceiling: dict[str, float], pool: concurrent.futures.Executor) -> None:
        """Have a chain compiled that is as long as a figure needs: long ones take minutes."""
        moved, flops = self.cases.cost(self.case)
        seconds = max(moved / ceiling["bytes_per_s"], flops / ceiling["flop_per_s"])
        if self._is_in_place:
            # It updates its arguments, so one set goes round; alone it copied them first.
            self.copies = 1
        else:
            largest = max(moved, self._shapes[0].size * self._shapes[0].dtype.itemsize)
            self.copies = min(6, int(4 * L2_BYTES // largest) + 1)
            seconds = max(seconds, self.busy)
        # A call that has nothing to do costs nothing.
        self.count = int(np.clip(CHAIN_S / seconds, 1, MOST_CHAINED)) if seconds else MOST_CHAINED
        calls = chain(self._function, self.cases.following, self.count)
        shapes = [self._shapes] * self.copies
        self.chain = pool.submit(lambda: calls.lower(shapes).compile())

    def output(self) -> tuple[np.ndarray, ...]:
        """Return what one call gives, checked for what is wrong anyway."""
        arguments, _ = self.cases.inputs(self.case)
        output = jax.block_until_ready(self.call.result()(*arguments))
        return self.cases.comparable(self.case, output, arguments)

    def seconds(self) -> float:
        """Return device seconds of one call."""
        sets = [self.cases.inputs(self.case, seed)[0] for seed in range(self.copies)]
        return seconds_per_launch(self.chain.result(), sets)[0] / self.count

    def kernels_us(self) -> dict[str, float]:
        """Return what one call spends in each kernel."""
        return kernel_microseconds(self.call.result(), self.cases.inputs(self.case)[0])


def measure(
    candidates: list[Candidate], implementations: list[str], ceiling: dict, profile: bool
) -> list[dict]:
    """Measure one case; one row an implementation. The first candidate is the reference."""
    moved, flops = candidates[0].cases.cost(candidates[0].case)
    reference, rows = candidates[0].output(), []
    for candidate in candidates:
        if candidate.implementation not in implementations:
            continue
        row = {
            "operation": candidate.operation,
            "case": candidate.case.name,
            "implementation": candidate.implementation,
        }
        if candidate.unsupported is not None:
            rows.append(row | {"unsupported": candidate.unsupported})
            continue
        output = reference if candidate is candidates[0] else candidate.output()
        pairs = zip(output, reference, strict=True)
        seconds = candidate.seconds()
        by_bytes, by_flops = moved / seconds, flops / seconds
        limits = by_bytes / ceiling["bytes_per_s"], by_flops / ceiling["flop_per_s"]
        rows.append(
            row
            | {
                "us": seconds * 1e6,
                "busy_us": candidate.busy * 1e6,
                "gb_per_s": by_bytes / 1e9,
                "tflop_per_s": by_flops / 1e12,
                "fraction": max(limits),
                "bound": "bytes" if limits[0] >= limits[1] else "flops",
                "difference": max(float(np.nanmax(np.abs(a - b), initial=0)) for a, b in pairs),
            }
        )
        if profile:
            rows[-1]["kernels_us"] = candidate.kernels_us()
    return rows


def show(row: dict) -> str:
    """Return the table line of a row."""
    name = f"{row['operation']:16} {row['case']:26} {row['implementation']:11}"
    if "us" not in row:
        return f"{name} {row.get('unsupported') or row.get('error')}"
    rate = f"{row['gb_per_s']:7.0f} GB/s {row['tflop_per_s']:6.1f} TFLOP/s"
    times = f"{row['us']:9.1f} us (busy {row['busy_us']:.1f})"
    numbers = f"{times} {rate} {row['fraction']:5.2f} of {row['bound']}"
    parts = "".join(f"\n    {us:9.1f} us {name}" for name, us in row.get("kernels_us", {}).items())
    return f"{name} {numbers}  difference {row['difference']:.1e}{parts}"


def write(path: pathlib.Path, ceiling: dict, rows: list[dict]) -> None:
    """Write what was measured so far, with what is needed to repeat it."""
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/kernels.py " + " ".join(sys.argv[1:]),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "ceilings": ceiling,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def candidates_of(operation: str, options, ceiling: dict) -> list[list[Candidate]]:
    """Return the candidates of each case that is asked for, XLA's first; all are compiled."""
    cases = importlib.import_module(f"{pallas_kernels.__name__}.{operation}.cases").CASES
    names = dict.fromkeys(["xla", *options.implementations])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [
            [Candidate(operation, case, name, pool) for name in names]
            for case in cases
            if "bench" in case.tags.split() and options.filter in f"{operation} {case.name}"
        ]
        compiled = [c for c in itertools.chain.from_iterable(found) if c.unsupported is None]
        concurrent.futures.wait([candidate.call for candidate in compiled])
        timed = [c for c in compiled if c.implementation in options.implementations]
        for prepare in (Candidate.look, lambda candidate: candidate.lengthen(ceiling, pool)):
            for candidate in timed:
                with contextlib.suppress(Exception):  # `measure` meets it again, and reports it
                    prepare(candidate)
    return found


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--filter", default="", help="only the cases whose name has this text")
    parser.add_argument("--implementations", nargs="+", default=["xla", "mosaic_gpu"])
    parser.add_argument("--profile", action="store_true", help="time each kernel of a call, too")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    ceiling = ceilings()
    print({name: f"{value:.3e}" for name, value in ceiling.items()}, flush=True)
    rows = []
    for operation in options.operations:
        for candidates in candidates_of(operation, options, ceiling):
            try:
                found = measure(candidates, options.implementations, ceiling, options.profile)
            except Exception as error:  # one case that fails must not cost the others
                row = {"operation": operation, "case": candidates[0].case.name}
                found = [row | {"implementation": "?", "error": repr(error)[:300]}]
            rows += found
            print("\n".join(map(show, found)), flush=True)
            if options.out:  # after every case: a run that is cut short leaves what it has
                write(options.out, ceiling, rows)


if __name__ == "__main__":
    main()
