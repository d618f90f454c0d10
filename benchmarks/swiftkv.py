"""What SwiftKV gains: the same measurements of a model with and without it, in one process.

    python benchmarks/swiftkv.py --load-format dummy --out benchmarks/results/h200/swiftkv.json

Prefill of many long prompts, time to the first token of one, time per output token by batch, and
offline throughput; the protocol is that of `offline.py`. A ratio above one is in SwiftKV's favour.
One engine after the other, each with the whole GPU; the weights may be random, as the tokens are.
"""

import argparse
import datetime
import gc
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from offline import Bench, write

from arctic_jax import LLM, __version__

CONFIGS = Path("benchmarks") / "configs"


def main() -> None:
    """Measure both, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=str(CONFIGS / "llama-3.1-8b"))
    parser.add_argument("--swiftkv", default=str(CONFIGS / "llama-3.1-8b-swiftkv"))
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--max-model-len", type=int, default=8448)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--num-blocks", type=int, default=None)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--ulysses-sequence-parallel-size", type=int, default=1)
    parser.add_argument("--prefill", type=int, nargs=2, default=(8, 8192), metavar=("N", "LEN"))
    parser.add_argument("--ttft-len", type=int, default=8192)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--decode-len", type=int, nargs=2, default=(1024, 128))
    parser.add_argument("--throughput", type=int, default=256, metavar="REQUESTS")
    parser.add_argument("--throughput-len", type=int, nargs=2, default=(2000, 256))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)

    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"arctic_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "device": jax.devices()[0].device_kind,
        "devices": args.tensor_parallel_size * args.ulysses_sequence_parallel_size,
    }
    for name in ("base", "swiftkv"):
        result[name] = measure(getattr(args, name), args)
        write(args.out, result)
    result["ratios"] = ratios(result["base"], result["swiftkv"])
    write(args.out, result)
    for name, ratio in result["ratios"].items():
        print(f"{name:24s} {ratio:6.3f}", flush=True)


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one engine; its memory is free again afterwards."""
    start = time.perf_counter()
    llm = LLM(
        model,
        load_format=args.load_format,
        implementation=args.implementation,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        num_blocks=args.num_blocks,
        enable_prefix_caching=False,
        tensor_parallel_size=args.tensor_parallel_size,
        ulysses_sequence_parallel_size=args.ulysses_sequence_parallel_size,
    )
    runner = llm.engine.runner
    found: dict[str, Any] = {
        "model": model,
        "ready_s": time.perf_counter() - start,
        "num_blocks": runner.num_blocks,
        "cache_bytes_per_token": runner.cache_spec.bytes_per_block / runner.cache_spec.block_size,
    }
    print(
        f"{model}: ready after {found['ready_s']:.1f} s, {found['num_blocks']} blocks", flush=True
    )
    bench = Bench(llm, args.repeats)
    prompts, length = args.prefill
    found["prefill_tok_s"] = prompts * length / bench.seconds(prompts, length, 1)
    found["ttft_ms"] = bench.seconds(1, args.ttft_len, 1) * 1e3
    found["tpot_ms"] = {
        str(batch): tpot_ms(bench, batch, *args.decode_len) for batch in args.batches
    }
    bench.repeats = 1
    input_len, output_len = args.throughput_len
    seconds = bench.seconds(args.throughput, input_len, output_len)
    found["throughput_tok_s"] = args.throughput * (input_len + output_len) / seconds
    print({name: value for name, value in found.items() if name != "model"}, flush=True)
    del bench, runner, llm
    gc.collect()
    return found


def tpot_ms(bench: Bench, batch: int, input_len: int, output_len: int) -> float:
    """Milliseconds per output token of a batch, after its first."""
    first = bench.seconds(batch, input_len, 1)
    whole = bench.seconds(batch, input_len, output_len)
    return (whole - first) / (output_len - 1) * 1e3


def ratios(base: dict[str, Any], swiftkv: dict[str, Any]) -> dict[str, float]:
    """How much better each figure is with SwiftKV."""
    found = {
        "prefill": swiftkv["prefill_tok_s"] / base["prefill_tok_s"],
        "ttft": base["ttft_ms"] / swiftkv["ttft_ms"],
        "throughput": swiftkv["throughput_tok_s"] / base["throughput_tok_s"],
        "cache_tokens": base["cache_bytes_per_token"] / swiftkv["cache_bytes_per_token"],
    }
    for batch, milliseconds in base["tpot_ms"].items():
        found[f"tpot_batch_{batch}"] = milliseconds / swiftkv["tpot_ms"][batch]
    return found


if __name__ == "__main__":
    main()
