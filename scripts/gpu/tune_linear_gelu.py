"""Which sizes of the `linear_gelu` kernel are fastest for encoders, against XLA's product and GELU.

    python scripts/gpu/tune_linear_gelu.py --out FILE    # a minute
    python scripts/gpu/tune_linear_gelu.py --lower       # no GPU: do all the sizes lower?

For each `bench` case: the time of XLA's product, bias and GELU, that of its product alone, then a
line for each config of the kernel, the fastest first, for some with its largest difference from
XLA's result. A time is that of the device alone, of calls that follow each other
(`benchmarks/kernels.py`).
"""

import argparse
import concurrent.futures
import faulthandler
import functools
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from arctic_jax.pallas_kernels.linear_gelu import cases, mosaic_gpu, reference
from arctic_jax.pallas_kernels.linear_gelu.mosaic_gpu import Config
from benchmarks import kernels

CASES = {case.name: case for case in cases.CASES if "bench" in case.tags.split()}
CONFIGS = (
    Config(128, 192, 4, "weight"),
    Config(128, 192, 5, "weight", pieces=1),
    Config(128, 192, 4, "tokens"),
    Config(128, 192, 4),
    Config(192, 128, 4, "weight"),
    Config(192, 128, 4, "tokens"),
    Config(192, 128, 5, "tokens", pieces=1),
    Config(128, 128, 6, "weight"),
    Config(128, 128, 6, "tokens"),
    Config(128, 128, 5),
    Config(64, 256, 4, "tokens"),
)
HANGS_S = 40  # a measurement takes less than 1; then the process ends: a kernel cannot be stopped
CALLS, COPIES = 4, 2  # in one program, and the sets of arguments that they go round


def kernel(config: Config):
    """Return the kernel with some sizes."""
    return functools.partial(mosaic_gpu.linear_gelu, config=config)


def product(x, weight, bias):
    """Return XLA's product alone."""
    del bias
    return x @ weight


def tune(case: cases.Case, configs: list[Config], options, deadline: float) -> dict:
    """Compile all the configs, time them one after the other, and check the fastest."""
    sets = jax.jit(lambda: [cases.inputs(case, seed)[0] for seed in range(COPIES)])
    shapes = jax.eval_shape(sets)

    def guarded(function, *arguments):
        if time.monotonic() > deadline:
            return None, "no time left"
        try:
            return function(*arguments), None
        except Exception as error:  # one config that fails must not cost the others
            return None, repr(error)[:300]
        finally:
            faulthandler.cancel_dump_traceback_later()

    def build(call):
        return kernels.chain(call, cases.following, CALLS).lower(shapes).compile()

    def microseconds(program):
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        seconds, _ = kernels.seconds_per_launch(program, jax.block_until_ready(sets()))
        return seconds / CALLS * 1e6

    def difference(config):
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        result, wanted = (
            np.asarray(jax.jit(call)(*one)).astype(np.float32)
            for call in (kernel(config), reference.linear_gelu)
        )
        return float((np.abs(result - wanted) / (1 + np.abs(wanted))).max())

    begin = time.monotonic()
    calls = [product, reference.linear_gelu, *map(kernel, configs)]
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        built = list(pool.map(functools.partial(guarded, build), calls))
    compiling = time.monotonic() - begin

    rows = []
    for config, (program, error) in zip(["product", "xla", *configs], built, strict=True):
        print(f"{case.name}: {config}", file=sys.stderr, flush=True)
        us, error = (None, error) if error else guarded(microseconds, program)
        row = {"config": vars(config) if isinstance(config, Config) else {}}
        rows.append(row | ({"error": error} if error else {"us": us}))
    alone, xla, *rows = rows
    rows.sort(key=lambda row: row.get("us", math.inf))
    one = sets()[0]
    for row in [row for row in rows if "us" in row][: options.checked]:
        row["difference"], error = guarded(difference, Config(**row["config"]))
        row |= {"error": error} if error else {}
    _, flops = cases.cost(case)
    return {
        "case": case.name,
        "flops": flops,
        "product": alone,
        "xla": xla,
        "configs": rows,
        "compile_s": compiling,
    }


def show(found: dict) -> str:
    """Return the lines of a case: XLA's times, and those of the configs."""
    theirs = found["xla"].get("us", math.nan)
    errors = " ".join(found[name].get("error", "") for name in ("product", "xla"))
    times = f"product {found['product'].get('us', math.nan):.1f} us, XLA {theirs:.1f} us {errors}"
    text = [f"{found['case']}: {times}, compiled in {found['compile_s']:.0f} s"]
    for row in found["configs"]:
        sizes = " ".join(f"{name} {value}" for name, value in row["config"].items())
        if "us" in row:
            rate = f"{found['flops'] / row['us'] / 1e6:5.0f} TFLOP/s"
            line = f"  {row['us']:6.1f} us {theirs / row['us']:5.2f} x {rate}  {sizes}"
            if row.get("difference") is not None:
                line += f"  difference {row['difference']:.1e}"
        else:
            line = f"  failed: {sizes}"
        text.append(f"{line} {row.get('error', '')}".rstrip())
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--most", type=int, default=99, help="configs a case")
    parser.add_argument("--checked", type=int, default=2, help="configs a case, the fastest ones")
    parser.add_argument("--limit", type=float, default=75, help="seconds in all")
    parser.add_argument("--threads", type=int, default=14, help="that compile at once")
    parser.add_argument("--lower", action="store_true", help="lower all configs, time none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit
    results = []
    for name in options.cases:
        case = CASES[name]
        configs = [c for c in CONFIGS if case.outputs % (c.outputs * c.across) == 0]
        configs = configs[: options.most]
        if options.lower:
            arguments = jax.eval_shape(lambda case=case: cases.inputs(case)[0])
            for config in configs:
                jax.jit(kernel(config)).trace(*arguments).lower(lowering_platforms=("cuda",))
            print(f"{name}: {len(configs)} configs lower", flush=True)
            continue
        results.append(tune(case, configs, options, deadline))
        print(show(results[-1]), flush=True)
        if options.out:
            document = {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "command": "python scripts/gpu/tune_linear_gelu.py " + " ".join(sys.argv[1:]),
                "cases": results,
            }
            options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
