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
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tuning

from arctic_jax.pallas_kernels.linear import cases, mosaic_gpu, reference
from arctic_jax.pallas_kernels.linear.mosaic_gpu import SMS, Config, Problem
from benchmarks import kernels

BYTES_PER_S = 4.3e12


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


def with_keywords(function: Callable, case: cases.Case, **keywords) -> Callable:
    """Return the kernel or XLA's product as a function of a case's arguments."""
    keywords |= {"bias": None, "gated": case.gated, "inputs_first": case.inputs_first}
    return functools.partial(function, **keywords)


def tune(case: cases.Case, candidates: dict[Config, Callable], options: argparse.Namespace) -> dict:
    """Time the kernel with each config, XLA's product, and what the chains of both have beside."""
    xla = with_keywords(reference.linear, case)
    shape = jax.eval_shape(lambda: xla(*cases.inputs(case)[0])).shape
    others = {"chain": lambda x, _: jnp.resize(jax.lax.optimization_barrier(x), shape), "xla": xla}
    moved, _ = cases.cost(case)
    weight_bytes = 2 * math.prod(case.weight)
    count = int(np.clip(kernels.CHAIN_S * BYTES_PER_S / weight_bytes, 8, 64))
    copies = min(6, int(4 * kernels.L2_BYTES // weight_bytes) + 1)
    found = tuning.tune(cases, case, others, candidates, count, copies, options)
    return {"case": case.name, "floor_us": moved / BYTES_PER_S * 1e6} | found


def show(found: dict, lines: int) -> str:
    """Return the lines of a shape: XLA's time, and the fastest configs."""
    xla, rows = found["xla"], found["configs"]
    theirs = xla.get("us", math.nan)
    times = f"floor {found['floor_us']:.1f} us, XLA {theirs:.1f} {xla.get('error', '')}"
    times += f", nothing {found['chain'].get('us', math.nan):.1f}"
    text = [f"{found['case']}: {times}, compiled in {found['compile_s']:.0f} s"]
    failed = [row for row in rows if "error" in row]
    for row in [row for row in rows if "us" in row][:lines] + failed[:3]:
        if "error" in row:
            text.append(f"  failed ({len(failed)} did): {tuning.sizes(row)}: {row['error']}")
        else:
            text.append(tuning.line(row, theirs))
    return "\n".join(text)


def main() -> None:
    parser = tuning.parser(__doc__, most=7, limit=60)
    parser.add_argument("--model", default="llama_8b", choices=sorted(cases.LAYERS))
    parser.add_argument("--products", nargs="+", default=["gate_up", "down", "qkv", "output"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 32, 256])
    parser.add_argument("--lines", type=int, default=8, help="configs shown of a case")
    options = parser.parse_args()
    results = []
    for tokens, product in itertools.product(options.tokens, options.products):
        name = f"b{tokens}_{options.model}_{product}"
        case = cases.Case(name, tokens, **cases.LAYERS[options.model][product])
        arguments = jax.eval_shape(lambda case=case: cases.inputs(case)[0])
        problem = Problem.of(*arguments[:2], case.gated, case.inputs_first)
        best = mosaic_gpu.choose_config(problem)
        found = configs(problem, options.most) + ([best] if best else [])
        candidates = {c: with_keywords(mosaic_gpu.linear, case, config=c) for c in found}
        if not candidates:
            print(f"{name}: no sizes, the sums are too many for the registers", flush=True)
            continue
        if options.lower:
            tuning.lower(cases, case, candidates.values())
            print(f"{name}: {len(candidates)} configs lower, by default {best}", flush=True)
            continue
        if tuning.late(options):
            print(f"{name}: no time left", flush=True)
            continue
        results.append(tune(case, candidates, options))
        print(show(results[-1], options.lines), flush=True)
        if options.out:
            tuning.write(options.out, shapes=results)


if __name__ == "__main__":
    main()
