"""What a token takes when a step draws several: `num_scheduler_steps`, side by side.

    python scripts/gpu/rounds.py --model benchmarks/configs/smollm2-135m --out rounds.json

One engine of random weights after the other, each with another number of rounds, in turns so often
as `--repeats` says within itself: `--batches` sequences of `--context` tokens get 256 more, and the
time between the first and the last, by its median, is what is printed, in milliseconds a token.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import numpy as np

from arctic_jax import LLM, SamplingParams
from arctic_jax.serving import environment

TOKENS = 256


def milliseconds_a_token(llm: LLM, batch: int, context: int, seed: int) -> float:
    prompts = np.random.default_rng(seed).integers(0, 30_000, (batch, context)).tolist()
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    metrics = [output.metrics for output in outputs]
    first = max(m.first_token_time for m in metrics)
    last = min(m.last_token_time for m in metrics)
    return (last - first) / (TOKENS - 1) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="benchmarks/configs/smollm2-135m")
    parser.add_argument("--rounds", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for rounds in args.rounds:
        begin = time.perf_counter()
        llm = LLM(
            args.model,
            load_format="dummy",
            max_model_len=2048,
            max_num_seqs=max(args.batches),
            max_num_batched_tokens=2048,
            num_blocks=2048,
            enable_prefix_caching=False,
            num_scheduler_steps=rounds,
        )
        row = {"start_s": round(time.perf_counter() - begin, 1)}
        for batch in args.batches:
            times = [
                milliseconds_a_token(llm, batch, args.context, seed) for seed in range(args.repeats)
            ]
            row[f"batch_{batch}_ms"] = round(statistics.median(times), 3)
            row[f"batch_{batch}_least_ms"] = round(min(times), 3)
        found[str(rounds)] = row
        print(rounds, row, flush=True)
        args.out.write_text(json.dumps({**environment.record(), "rounds": found}, indent=1) + "\n")
        del llm
        gc.collect()


if __name__ == "__main__":
    main()
