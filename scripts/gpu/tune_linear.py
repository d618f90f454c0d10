"""Which sizes of the `linear` kernel are fastest for the products of a layer, against XLA's.

    python scripts/gpu/tune_linear.py --out FILE         # a minute
    python scripts/gpu/tune_linear.py --tokens 64 --most 99 --limit 300 --out FILE
    python scripts/gpu/tune_linear.py --lower            # no GPU: do all the sizes lower?

For each product and number of tokens: the time of XLA's product, then a line for each config of the
kernel, the fastest first, for some with its largest difference from XLA's result. A time is that of
the device alone, of calls that follow each other (`benchmarks/kernels.py`), the small kernel that
makes one depend on the other included; `nothing` is a chain of that kernel alone. `floor` is the
weight at 4.3 TB/s.
"""

import argparse
import concurrent.futures
import dataclasses
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
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels.linear import cases, mosaic_gpu, reference
from arctic_jax.pallas_kernels.linear.mosaic_gpu import SMS, Config, Problem
from benchmarks import kernels

BYTES_PER_S = 4.3e12
HANGS_S = 40  # a measurement takes less than 1; then the process ends: a kernel cannot be stopped
CHAIN_S = 4e-4  # of a program, at the floor: longer than its launch takes the host


def configs(problem: Problem, most: int) -> list[Config]:
    """Return sizes worth a try, all of whose thread blocks run at once; at most `most`.

    As many stages as fit with the other thread blocks of a multiprocessor.
    """
    found = []
    for (outputs, warpgroups), splits, multicast, depth, resident in itertools.product(
        ((64, 1), (128, 2)), (1, 2, 4), (1, 2, 4, 8), (64, 128, 256), (1, 2)
    ):
        cluster = splits * multicast
        blocks = problem.shards * problem.outputs // outputs * splits
        if cluster > mosaic_gpu.MAX_CLUSTER or blocks < 0.6 * SMS:
            continue
        if blocks > resident * mosaic_gpu.at_once(cluster):
            continue
        if resident == 2 and blocks <= mosaic_gpu.at_once(cluster):
            continue
        if multicast > 1 and problem.tokens < 32:
            continue  # the tokens are next to nothing
        if problem.parts * outputs // warpgroups * problem.columns > (
            mosaic_gpu.MAX_SUMS * mosaic_gpu.THREADS // resident
        ):
            continue
        config = Config(outputs, depth, 2, splits, multicast, warpgroups)
        stages = problem.most_stages(config, resident)
        if stages >= 3:
            config = dataclasses.replace(config, stages=stages)
            if problem.refuses(config) is None:
                found.append(config)
    return sorted(found, key=functools.partial(expected_cost, problem))[:most]


def expected_cost(problem: Problem, config: Config) -> float:
    """Return a cost that orders sizes by what was found with 64 tokens, to try the best first.

    The bytes of tokens that a thread block takes in, and that it reads, by those of the weight; a
    cluster's waiting; copies of less than 128 inputs.
    """
    tokens = problem.columns / (problem.parts * config.outputs)
    waiting = 0.35 * math.log2(config.splits) + 0.03 * math.log2(config.multicast)
    return tokens * (1 + 1 / config.multicast) / 2 + waiting + 0.1 * (config.depth == 64)


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


def no_product(case: cases.Case):
    """Return a function that does nothing, so that its chain is what the others have beside."""
    shape = jax.eval_shape(kernel(case, None), *jax.eval_shape(lambda: cases.inputs(case)[0])).shape
    return lambda x, *_: jnp.resize(jax.lax.optimization_barrier(x), shape)


def tune(case: cases.Case, candidates: list[Config], options, deadline: float) -> dict:
    """Compile all the configs, time them one after the other, and check the fastest."""
    moved, _ = cases.cost(case)
    weight_bytes = 2 * math.prod(case.weight)
    count = int(np.clip(CHAIN_S * BYTES_PER_S / weight_bytes, 8, 64))
    copies = min(6, int(4 * kernels.L2_BYTES // weight_bytes) + 1)
    sets = jax.jit(lambda: [cases.inputs(case, seed)[0] for seed in range(copies)])
    shapes = jax.eval_shape(sets)

    def build(call):
        return kernels.chain(call, cases.following, count).lower(shapes).compile()

    def guarded(function, *arguments):
        if time.monotonic() > deadline:
            return None, "no time left"
        try:
            return function(*arguments), None
        except Exception as error:  # one config that fails must not cost the others
            return None, repr(error)[:300]

    begin = time.monotonic()
    functions = [no_product(case), *(kernel(case, config) for config in [None, *candidates])]
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        ready = pool.submit(lambda: sets.lower().compile())
        built = list(pool.map(functools.partial(guarded, build), functions))
        sets = ready.result()
    compiling = time.monotonic() - begin

    def microseconds(program):
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        seconds, _ = kernels.seconds_per_launch(program, jax.block_until_ready(sets()))
        faulthandler.cancel_dump_traceback_later()
        return seconds / count * 1e6

    rows = []
    for config, (program, error) in zip(["chain", None, *candidates], built, strict=True):
        print(f"{case.name}: {config}", file=sys.stderr, flush=True)
        us, error = (None, error) if error else guarded(microseconds, program)
        row = {"config": vars(config) if isinstance(config, Config) else {}}
        rows.append(row | ({"error": error} if error else {"us": us}))
    chain, xla, *rows = rows
    rows.sort(key=lambda row: row.get("us", math.inf))

    one = sets()[0]

    def difference(config):
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        result, wanted = (
            np.asarray(jax.jit(kernel(case, c))(*one)).astype(np.float64) for c in (config, None)
        )
        faulthandler.cancel_dump_traceback_later()
        return float((np.abs(result - wanted) / (1 + np.abs(wanted))).max())

    for row in [row for row in rows if "us" in row][: options.checked]:
        row["difference"], error = guarded(difference, Config(**row["config"]))
        row |= {"error": error} if error else {}
    return {
        "case": case.name,
        "floor_us": moved / BYTES_PER_S * 1e6,
        "chain": chain,
        "xla": xla,
        "configs": rows,
        "compile_s": compiling,
    }


def show(found: dict, lines: int) -> str:
    """Return the lines of a shape: XLA's time, and the fastest configs."""
    xla, rows = found["xla"], found["configs"]
    theirs = xla.get("us", math.nan)
    times = f"floor {found['floor_us']:.1f} us, XLA {theirs:.1f} {xla.get('error', '')}"
    times += f", nothing {found['chain'].get('us', math.nan):.1f}"
    text = [f"{found['case']}: {times}, compiled in {found['compile_s']:.0f} s"]
    failed = [row for row in rows if "error" in row]
    for row in [row for row in rows if "us" in row][:lines] + failed[:3]:
        sizes = " ".join(f"{name} {value}" for name, value in row["config"].items())
        if "error" in row:
            text.append(f"  failed ({len(failed)} did): {sizes}: {row['error']}")
        else:
            times = f"{row['us']:6.1f} us {theirs / row['us']:5.2f} x"
            differs = f"  difference {row['difference']:.1e}" if "difference" in row else ""
            text.append(f"  {times}  {sizes}{differs}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_8b", choices=sorted(cases.LAYERS))
    parser.add_argument("--products", nargs="+", default=["gate_up", "down", "qkv", "output"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 32, 256])
    parser.add_argument("--most", type=int, default=7, help="configs a shape")
    parser.add_argument("--checked", type=int, default=2, help="configs a shape, the fastest ones")
    parser.add_argument("--limit", type=float, default=60, help="seconds in all")
    parser.add_argument("--threads", type=int, default=14, help="that compile at once")
    parser.add_argument("--lines", type=int, default=8, help="configs shown of a shape")
    parser.add_argument("--lower", action="store_true", help="lower all configs, time none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit
    results = []
    for tokens, product in itertools.product(options.tokens, options.products):
        name = f"b{tokens}_{options.model}_{product}"
        case = cases.Case(name, tokens, **cases.LAYERS[options.model][product])
        arguments = jax.eval_shape(lambda case=case: cases.inputs(case)[0])
        problem = Problem.of(*arguments[:2], case.gated, case.inputs_first)
        candidates = configs(problem, options.most)
        if (best := mosaic_gpu.choose_config(problem)) and best not in candidates:
            candidates.append(best)
        if not candidates:
            print(f"{name}: no sizes, the sums are too many for the registers", flush=True)
            continue
        if options.lower:
            for config in candidates:
                lower(case, config)
            print(f"{name}: {len(candidates)} configs lower, by default {best}", flush=True)
            continue
        if time.monotonic() > deadline:
            print(f"{name}: no time left", flush=True)
            continue
        results.append(tune(case, candidates, options, deadline))
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
