"""Which sizes of the `linear_gelu` kernel are fastest for encoders, against XLA's product and GELU.

    python scripts/gpu/tune_linear_gelu.py --out FILE    # a minute
    python scripts/gpu/tune_linear_gelu.py --lower       # no GPU: do all the sizes lower?

For each `bench` case: the time of XLA's product, bias and GELU, that of its product alone, then a
line for each config of the kernel, the fastest first, for some with its largest difference from
XLA's result. A time is that of the device alone, of calls that follow each other
(`benchmarks/kernels.py`).
"""

import functools
import math

import tuning

from arctic_jax.pallas_kernels.linear_gelu import cases, mosaic_gpu, reference
from arctic_jax.pallas_kernels.linear_gelu.mosaic_gpu import Config

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
OTHERS = {"product": lambda x, weight, bias: x @ weight, "xla": reference.linear_gelu}
CALLS, COPIES = 4, 2  # in one program, and the sets of arguments that they go round


def show(found: dict) -> str:
    """Return the lines of a case: XLA's times, and those of the configs."""
    theirs = found["xla"].get("us", math.nan)
    errors = " ".join(found[name].get("error", "") for name in ("product", "xla"))
    times = f"product {found['product'].get('us', math.nan):.1f} us, XLA {theirs:.1f} us {errors}"
    text = [f"{found['case']}: {times}, compiled in {found['compile_s']:.0f} s"]
    for row in found["configs"]:
        if "us" in row:
            line = tuning.line(row, theirs, f" {found['flops'] / row['us'] / 1e6:5.0f} TFLOP/s")
        else:
            line = f"  failed: {tuning.sizes(row)}"
        text.append(f"{line} {row.get('error', '')}".rstrip())
    return "\n".join(text)


def main() -> None:
    parser = tuning.parser(__doc__, most=99, limit=75)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    results = []
    for name in options.cases:
        case = CASES[name]
        configs = [c for c in CONFIGS if case.outputs % (c.outputs * c.across) == 0]
        candidates = {
            config: functools.partial(mosaic_gpu.linear_gelu, config=config)
            for config in configs[: options.most]
        }
        if options.lower:
            tuning.lower(cases, case, candidates.values())
            print(f"{name}: {len(candidates)} configs lower", flush=True)
            continue
        found = tuning.tune(cases, case, OTHERS, candidates, CALLS, COPIES, options)
        results.append({"case": name, "flops": cases.cost(case)[1]} | found)
        print(show(results[-1]), flush=True)
        if options.out:
            tuning.write(options.out, cases=results)


if __name__ == "__main__":
    main()
