"""Where the time of a full batch of texts goes on the GPU: microseconds a layer, by kernel.

    python scripts/gpu/embedding_trace.py --tokenizer DIR --implementations xla mosaic_gpu --out DIR

A dummy model's batches of random token ids are profiled, with attention by each implementation.
The programs that XLA made of them are written beside the figures.
"""

import argparse
import collections
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from trace_summary import gpu_kernels, read_trace

from arctic_jax import LLM
from arctic_jax.embedding.packing import Packer
from arctic_jax.embedding.runner import EncoderRunner
from arctic_jax.encoder_batch import EncoderBucket, pack

LAUNCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="benchmarks/configs/arctic-embed-m")
    parser.add_argument("--tokenizer", required=True, help="for random weights")
    parser.add_argument("--implementations", nargs="+", default=["xla", "mosaic_gpu"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 512])
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for implementation in arguments.implementations:
        runner = LLM(
            arguments.model,
            load_format="dummy",
            tokenizer=arguments.tokenizer,
            implementation=implementation,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
        ).embedder.runner
        for length in arguments.lengths:
            folder = arguments.out / f"{implementation}_{length}"
            rows.append({"implementation": implementation} | measure(runner, length, folder))
            show(rows[-1])
    (arguments.out / "embedding_trace.json").write_text(json.dumps(rows, indent=1) + "\n")


def full_batch(runner: EncoderRunner, length: int) -> tuple[np.ndarray, EncoderBucket, int]:
    """Return a packed batch of texts of one length, its shape, and the tokens in it."""
    packer = Packer(runner.ladder)
    most = max(bucket.num_tokens for bucket in runner.ladder)
    packer.add((number, length) for number in range(-(-most // length)))
    plan = packer.take(rest=True)
    if plan is None:
        raise ValueError(f"no batch of texts of {length} tokens")
    draw = np.random.default_rng(0)
    windows = [[draw.integers(1, 1000, length).tolist() for _ in w] for w in plan.windows]
    return pack(windows, plan.bucket), plan.bucket, length * len(plan.lengths)


def measure(runner: EncoderRunner, length: int, folder: Path) -> dict[str, Any]:
    """Time and profile a batch."""
    packed, bucket, tokens = full_batch(runner, length)
    launch = lambda count: jax.block_until_ready(
        [runner.launch_packed(packed, bucket, tokens // length) for _ in range(count)]
    )
    launch(LAUNCHES)
    start = time.perf_counter()
    launch(20)
    seconds = (time.perf_counter() - start) / 20
    with jax.profiler.trace(str(folder)):
        launch(LAUNCHES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.txt").write_text(runner.program_text(bucket))
    layers = runner.model_config.num_hidden_layers
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for path in folder.rglob("*.trace.json.gz"):
        for start, stop, name in gpu_kernels(*read_trace(path)):
            name = re.sub(r"(_\d+)+$", "", name)[:90]
            total[name] += stop - start
            count[name] += 1
    return {
        "length": length,
        "window": bucket.window,
        "num_windows": bucket.num_windows,
        "tokens": tokens,
        "ms": seconds * 1e3,
        "tokens_per_second": tokens / seconds,
        "us_per_layer": {
            name: (micros / LAUNCHES / layers, count[name] / LAUNCHES / layers)
            for name, micros in total.most_common()
        },
    }


def show(row: dict[str, Any]) -> None:
    """Print a row: microseconds and calls a layer."""
    print(
        f"{row['implementation']}, {row['length']} tokens, {row['num_windows']} windows of "
        f"{row['window']}: {row['ms']:.2f} ms, {row['tokens_per_second'] / 1e6:.3f} M tokens/s"
    )
    for name, (micros, calls) in list(row["us_per_layer"].items())[:20]:
        print(f"{micros:10.1f} us {calls:6.2f} x  {name}", flush=True)


if __name__ == "__main__":
    main()
