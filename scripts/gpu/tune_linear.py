"""Which sizes of the `linear` kernel are fastest for the products of a layer, against XLA's.

    python scripts/gpu/tune_linear.py --tokens 64 16 128 --limit 400 --out FILE
    python scripts/gpu/tune_linear.py --lower            # no GPU: do all the sizes lower?

For each product and number of tokens: the time of XLA's product, then a line for each config of the
kernel, the fastest first, with its largest difference from XLA's result. A time is that of the
device alone, of calls that follow each other (`benchmarks/kernels.py`), the small kernel that makes
one depend on the other included. `floor` is the weight at 4.3 TB/s.
"""

import argparse
import concurrent.futures
import faulthandler
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from arctic_jax.pallas_kernels.linear import cases, mosaic_gpu, reference
from arctic_jax.pallas_kernels.linear.mosaic_gpu import SMEM_BYTES, SMS, Config, Problem
from benchmarks import kernels

BYTES_PER_S = 4.3e12
HANGS_S = 40  # a measurement takes less than 1; then the process ends: a kernel cannot be stopped
CHAIN_S = 4e-4  # of a program, at the floor: longer than its launch takes the host


def configs(problem: Problem, most: int) -> list[Config]:
    """Return sizes worth a try, all of whose thread blocks run at once; at most `most`.

    As many stages as fit with the other thread blocks of a multiprocessor.
    """
    found = []
    for rows, warpgroups, splits, depth, multicast in itertools.product(
        (64, 128), (1, 2), (1, 2, 3, 4, 6, 8), (64, 128, 256), (1, 2, 4)
    ):
        outputs = rows * warpgroups
        blocks = problem.shards * problem.outputs // outputs * splits
        resident = -(-blocks // SMS)
        if splits * multicast > 8 or not 0.6 * SMS <= blocks <= 3 * SMS:
            continue
        if resident == 3 and blocks < 2.5 * SMS:
            continue  # a part of the multiprocessors would have half as much again to do
        if multicast > 1 and problem.tokens < 32:
            continue  # the tokens are next to nothing
        if problem.parts * rows * problem.columns > mosaic_gpu.MAX_SUMS * 128 // resident:
            continue
        config = Config(outputs, depth, 2, splits, multicast, warpgroups)
        room = SMEM_BYTES // resident - 1024 - 2 * outputs * problem.share(config)
        stages = min(room // problem.stage_bytes(config), problem.inputs // depth // splits)
        if stages < 3:
            continue
        config = Config(outputs, depth, stages, splits, multicast, warpgroups)
        if problem.refuses(config) is None:
            found.append(config)
    # First those that ask for little: no clusters, then few blocks in each.
    found.sort(key=lambda c: (c.splits * c.multicast, c.depth == 256, c.warpgroups))
    return found[:most]


def lower(case: cases.Case, config: Config) -> None:
    """Lower the kernel for CUDA, on any machine."""
    arguments = jax.eval_shape(lambda: cases.inputs(case)[0])
    jax.jit(kernel(case, config)).trace(*arguments).lower(lowering_platforms=("cuda",))


def kernel(case: cases.Case, config: Config | None):
    """Return the kernel with some sizes, or XLA's product, as a function of a case's arguments."""
    keywords = {"gated": case.gated, "inputs_first": case.inputs_first}

    def call(x, weight, bias=None):
        if config is None:
            return reference.linear(x, weight, bias, **keywords)
        return mosaic_gpu.linear(x, weight, bias, **keywords, config=config)

    return call


def tune(case: cases.Case, candidates: list[Config], threads: int, deadline: float) -> dict:
    """Compile all the configs, then time them one after the other. Index 0 is XLA's product."""
    moved, _ = cases.cost(case)
    weight_bytes = 2 * math.prod(case.weight)
    count = int(np.clip(CHAIN_S * BYTES_PER_S / weight_bytes, 8, 64))
    copies = min(6, int(4 * kernels.L2_BYTES // weight_bytes) + 1)
    one = cases.inputs(case)[0]
    sets = jax.jit(lambda: [cases.inputs(case, seed)[0] for seed in range(copies)])

    def build(config):
        call = kernel(case, config)
        single = jax.jit(call).lower(*one).compile()
        shapes = jax.eval_shape(sets)
        return single, kernels.chain(call, cases.following, count).lower(shapes).compile()

    def guarded(function, *arguments):
        if time.monotonic() > deadline:
            return None, "no time left"
        try:
            return function(*arguments), None
        except Exception as error:  # one config that fails must not cost the others
            return None, repr(error)[:300]

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        built = list(pool.map(functools.partial(guarded, build), [None, *candidates]))
    compiling = time.monotonic() - begin

    wanted = None

    def measure(single, program):
        nonlocal wanted
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        result = np.asarray(single(*one)).astype(np.float64)
        wanted = result if wanted is None else wanted
        difference = float((np.abs(result - wanted) / (1 + np.abs(wanted))).max())
        seconds, _ = kernels.seconds_per_launch(program, jax.block_until_ready(sets()))
        faulthandler.cancel_dump_traceback_later()
        return {"us": seconds / count * 1e6, "difference": difference}

    rows = []
    for config, (programs, error) in zip([None, *candidates], built, strict=True):
        row = {} if config is None else vars(config)
        print(f"{case.name}: {config}", file=sys.stderr, flush=True)
        figures, error = (None, error) if error else guarded(measure, *programs)
        rows.append({"config": row, **(figures or {"error": error})})
    return {
        "case": case.name,
        "floor_us": moved / BYTES_PER_S * 1e6,
        "xla": rows[0],
        "configs": sorted(rows[1:], key=lambda row: row.get("us", math.inf)),
        "compile_s": compiling,
    }


def show(found: dict, lines: int) -> str:
    """Return the lines of a shape: XLA's time, and the fastest configs."""
    xla, rows = found["xla"], found["configs"]
    theirs = xla.get("us", math.nan)
    times = f"floor {found['floor_us']:.1f} us, XLA {theirs:.1f} {xla.get('error', '')}"
    text = [f"{found['case']}: {times}, compiled in {found['compile_s']:.0f} s"]
    failed = [row for row in rows if "error" in row]
    for row in [row for row in rows if "us" in row][:lines] + failed[:3]:
        sizes = " ".join(f"{name} {value}" for name, value in row["config"].items())
        if "error" in row:
            text.append(f"  failed ({len(failed)} did): {sizes}: {row['error']}")
        else:
            times = f"{row['us']:6.1f} us {theirs / row['us']:5.2f} x"
            text.append(f"  {times}  {sizes}  difference {row['difference']:.1e}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_8b", choices=sorted(cases.LAYERS))
    parser.add_argument("--products", nargs="+", default=["gate_up", "down", "qkv", "output"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 16, 128, 32, 2, 8, 256])
    parser.add_argument("--most", type=int, default=40, help="configs a shape")
    parser.add_argument("--limit", type=float, default=500, help="seconds in all")
    parser.add_argument("--threads", type=int, default=8, help="that compile at once")
    parser.add_argument("--lines", type=int, default=8, help="configs shown of a shape")
    parser.add_argument("--lower", action="store_true", help="lower all configs, time none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit
    results = []
    for tokens, product in itertools.product(options.tokens, options.products):
        name = f"b{tokens}_{options.model}_{product}"
        case = cases.Case(name, frozenset(), tokens, **cases.LAYERS[options.model][product])
        arguments = jax.eval_shape(lambda case=case: cases.inputs(case)[0])
        problem = Problem.of(*arguments[:2], case.gated, case.inputs_first)
        candidates = configs(problem, options.most)
        if (best := mosaic_gpu.choose_config(problem)) and best not in candidates:
            candidates.append(best)
        if options.lower:
            for config in candidates:
                lower(case, config)
            print(f"{name}: {len(candidates)} configs lower, by default {best}", flush=True)
            continue
        if time.monotonic() > deadline:
            print(f"{name}: no time left", flush=True)
            continue
        results.append(tune(case, candidates, options.threads, deadline))
        print(show(results[-1], options.lines), flush=True)
        if options.out:
            document = {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "command": "python scripts/gpu/tune_linear.py " + " ".join(sys.argv[1:]),
                "shapes": results,
            }
            options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
