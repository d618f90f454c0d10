"""Requests that arrive over time: latencies under dynamic traffic, for one way to use the GPUs.

    python benchmarks/traffic.py --model benchmarks/configs/llama-3.1-8b --load-format dummy \\
        --ulysses-sequence-parallel-size 4 --seconds 60 --rate 10 --out FILE
    python benchmarks/traffic.py ... --trace azure_llm_2023_code.csv --seconds 900 --speed 2

Without `--trace`, a Poisson background of `--rate` requests a second with four bursts of `--burst`
requests each (lengths from `--prompt-len` and `--output-len`; the same for the same `--seed`). A
trace has the columns TIMESTAMP, ContextTokens, GeneratedTokens; `--speed` compresses its time.
Random prompts, fixed lengths, no prefix caching. JSON: median and 99th percentile of time to first
token, time per output token and completion time, the highest tokens/s of a second, and the steps'
layouts over time.
"""

import argparse
import asyncio
import csv
import dataclasses
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arctic_jax import SamplingParams, __version__
from arctic_jax.serving.async_engine import AsyncEngine


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, tokens in, tokens out."""

    time: float
    prompt: int
    output: int


def bursty(args: argparse.Namespace) -> list[Arrival]:
    """Make a background with four bursts, evenly spread, of which each arrives within a second."""
    seconds, rate, burst = args.seconds, args.rate, args.burst
    rng = np.random.default_rng(args.seed)
    times = np.cumsum(rng.exponential(1 / rate, int(2 * rate * seconds) + 10))
    bursts = [seconds * (i + 0.5) / 4 + rng.uniform(0, 1, burst) for i in range(4)]
    times = np.sort(np.concatenate([times[times < seconds], *bursts]))
    prompts = np.exp(rng.uniform(*np.log(args.prompt_len), len(times))).astype(int)
    outputs = np.exp(rng.uniform(*np.log(args.output_len), len(times))).astype(int)
    rows = zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [Arrival(*row) for row in rows]


def from_trace(path: Path, seconds: float, speed: float) -> list[Arrival]:
    """Read the first `seconds` of a trace."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    # Seven decimals are one more than Python reads.
    times = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    arrivals = [
        Arrival((at - times[0]) / speed, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for at, row in zip(times, rows, strict=True)
        if at - times[0] < seconds
    ]
    return [arrival for arrival in arrivals if arrival.prompt and arrival.output]


async def replay(engine: AsyncEngine, arrivals: list[Arrival], vocab: int) -> list[dict[str, Any]]:
    """Send every request at its time; return what became of each."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab, arrival.prompt).tolist() for arrival in arrivals]
    start = time.perf_counter()

    async def one(arrival: Arrival, prompt: list[int]) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, arrival.time - (time.perf_counter() - start)))
        sent = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=arrival.output, ignore_eos=True)
        times: list[tuple[float, int]] = []
        async for state in engine.generate(prompt, params):
            times.append((time.perf_counter() - start, len(state.outputs[0].token_ids)))
        first, last = times[0][0], times[-1][0]
        return {
            "ttft_ms": (first - (sent - start)) * 1e3,
            "tpot_ms": (last - first) / max(arrival.output - 1, 1) * 1e3,
            "completion_s": last - (sent - start),
            "tokens_at": times,
            "prompt": arrival.prompt,
        }

    pairs = zip(arrivals, prompts, strict=True)
    return await asyncio.gather(*(one(arrival, prompt) for arrival, prompt in pairs))


def summary(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, 99th percentiles, and the best second."""
    result: dict[str, Any] = {"requests": len(requests)}
    for name in ("ttft_ms", "tpot_ms", "completion_s"):
        values = [request[name] for request in requests]
        result[name] = {"median": np.median(values), "p99": np.percentile(values, 99)}
    per_second: dict[int, int] = {}
    for request in requests:
        before, prompt = 0, request["prompt"]
        for at, tokens in request["tokens_at"]:  # the prompt counts where its first token comes
            per_second[int(at)] = per_second.get(int(at), 0) + tokens - before + prompt
            before, prompt = tokens, 0
    result["peak_tok_s"] = max(per_second.values())
    return result


def main() -> None:
    """Replay what the command line asks for, print a line, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--max-num-seqs", type=int, default=None)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--ulysses-sequence-parallel-size", type=int, default=1)
    parser.add_argument("--no-shift-parallel", action="store_true")
    parser.add_argument("--shift-parallel-threshold", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=5)
    parser.add_argument("--burst", type=int, default=60)
    lengths = {"type": int, "nargs": 2, "metavar": ("LOWEST", "HIGHEST")}
    parser.add_argument("--prompt-len", default=(512, 8192), **lengths)
    parser.add_argument("--output-len", default=(32, 512), **lengths)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, default=None)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.trace is None:
        arrivals = bursty(args)
    else:
        arrivals = from_trace(args.trace, args.seconds, args.speed)
    most = args.max_model_len
    arrivals = [a for a in arrivals if a.prompt + a.output <= most]
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps.jsonl"
        engine = AsyncEngine(
            args.model,
            load_format=args.load_format,
            max_model_len=most,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            data_parallel_size=args.data_parallel_size,
            tensor_parallel_size=args.tensor_parallel_size,
            ulysses_sequence_parallel_size=args.ulysses_sequence_parallel_size,
            enable_shift_parallel=not args.no_shift_parallel,
            shift_parallel_threshold=args.shift_parallel_threshold,
            enable_prefix_caching=False,
            step_log=str(steps),
        )
        started = time.time()
        requests = asyncio.run(replay(engine, arrivals, 1000))
        engine.shutdown()
        log = [json.loads(line) for line in steps.read_text().splitlines()]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"arctic_jax": __version__, "jax": jax.__version__},
        "devices": [device.device_kind for device in jax.devices()],
        **summary(requests),
        "arrivals": [round(arrival.time, 3) for arrival in arrivals],
        # Second, tokens, layout of each step.
        "steps": [[round(s["time"] - started, 3), s["num_tokens"], s["layout"]] for s in log],
    }
    print(
        f"{result['requests']} requests  ttft {result['ttft_ms']['median']:.0f} / "
        f"{result['ttft_ms']['p99']:.0f} ms  tpot {result['tpot_ms']['median']:.1f} / "
        f"{result['tpot_ms']['p99']:.1f} ms  completion {result['completion_s']['median']:.1f} / "
        f"{result['completion_s']['p99']:.1f} s  peak {result['peak_tok_s']} tok/s"
    )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
