"""Offline speed of one engine: TTFT, time per output token by batch, prefill, throughput.

    python benchmarks/offline.py --model benchmarks/configs/llama-3.1-8b --load-format dummy

TPOT is (time for `--output-len` tokens - time for 1) / (output_len - 1), all requests of a batch
submitted at once, random prompts, greedy, fixed lengths, no prefix caching: the protocol of
docs/performance.md. Each figure is the median of `--repeats` runs after one that warms up.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arctic_jax import LLM, SamplingParams, __version__
from arctic_jax.request import RequestOutputKind

ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
# Nobody looks on, so prompts are computed in full steps, and contexts are about equal.
UNWATCHED = dataclasses.replace(ENDLESS, output_kind=RequestOutputKind.FINAL_ONLY)


def main() -> None:
    """Measure what the command line asks for, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--max-model-len", type=int, default=8448)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--ulysses-sequence-parallel-size", type=int, default=1)
    parser.add_argument("--no-shift-parallel", action="store_true")
    parser.add_argument("--shift-parallel-threshold", type=int, default=None)
    parser.add_argument("--disable-custom-all-reduce", action="store_true")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--prefill", type=int, nargs=2, default=None, metavar=("PROMPTS", "LEN"))
    parser.add_argument(
        "--stall",
        type=int,
        nargs=2,
        metavar=("STREAMS", "LEN"),
        help="time between tokens of streams while a long prompt arrives",
    )
    parser.add_argument("--max-num-mixed-tokens", type=int, default=None)
    parser.add_argument("--num-scheduler-steps", type=int, default=None)
    parser.add_argument("--throughput", type=int, default=None, metavar="REQUESTS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="trace them too; see trace_summary.py"
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)

    start = time.perf_counter()
    llm = LLM(
        args.model,
        load_format=args.load_format,
        dtype=args.dtype,
        implementation=args.implementation,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_mixed_tokens=args.max_num_mixed_tokens,
        num_scheduler_steps=args.num_scheduler_steps,
        enable_prefix_caching=False,
        tensor_parallel_size=args.tensor_parallel_size,
        ulysses_sequence_parallel_size=args.ulysses_sequence_parallel_size,
        enable_shift_parallel=not args.no_shift_parallel,
        shift_parallel_threshold=args.shift_parallel_threshold,
        disable_custom_all_reduce=args.disable_custom_all_reduce,
    )
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"arctic_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "device": jax.devices()[0].device_kind,
        "ready_s": time.perf_counter() - start,
        "num_blocks": llm.engine.runner.num_blocks,
        "cache_tokens": llm.engine.runner.num_blocks * llm.engine.config.cache.block_size,
        "crossover": dataclasses.asdict(llm.engine.runner.crossover),
        "bytes_in_use": [(d.memory_stats() or {}).get("bytes_in_use") for d in jax.devices()],
    }
    print(f"ready after {result['ready_s']:.1f} s, {result['num_blocks']} blocks", flush=True)

    bench = Bench(llm, args.repeats)
    result["latency"] = []
    for batch in args.batches:
        first = bench.seconds(batch, args.input_len, 1)
        whole = bench.seconds(batch, args.input_len, args.output_len)
        steps = bench.decode_steps(batch, args.input_len, 32)
        row = {
            "batch": batch,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "ttft_ms": first * 1e3,
            "tpot_ms": (whole - first) / (args.output_len - 1) * 1e3,
            "decode_step_ms": statistics.median(steps) * 1e3,
        }
        result["latency"].append(row)
        print(
            f"batch {batch:4d}  ttft {row['ttft_ms']:8.1f} ms  tpot {row['tpot_ms']:7.2f} ms  "
            f"decode step {row['decode_step_ms']:7.2f} ms",
            flush=True,
        )
        write(args.out, result)
    if args.prefill:
        prompts, length = args.prefill
        seconds = bench.seconds(prompts, length, 1)
        result["prefill"] = {"prompts": prompts, "len": length, "tok_s": prompts * length / seconds}
        print(f"prefill {prompts} x {length}: {result['prefill']['tok_s']:.0f} tok/s", flush=True)
    if args.stall:
        result["stall"] = row = bench.stall(*args.stall)
        print("  ".join(f"{k} {v:.1f}" for k, v in row.items()), flush=True)
        write(args.out, result)
    if args.throughput:
        bench.repeats = 1
        seconds = bench.seconds(args.throughput, args.input_len, args.output_len)
        tokens = args.throughput * (args.input_len + args.output_len)
        result["throughput"] = {
            "requests": args.throughput,
            "total_tok_s": tokens / seconds,
            "requests_s": args.throughput / seconds,
        }
        print(f"throughput: {tokens / seconds:.0f} total tok/s", flush=True)
    write(args.out, result)
    if args.profile:
        bench.profile(args.profile, args.input_len, args.batches[-1:], args.prefill)


class Bench:
    """Runs batches of random prompts through one engine."""

    def __init__(self, llm: LLM, repeats: int) -> None:
        self.llm = llm
        self.repeats = repeats
        self.rng = np.random.default_rng(0)

    def seconds(self, batch: int, input_len: int, output_len: int) -> float:
        """Median time of a whole batch."""
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        times = []
        for _ in range(self.repeats + 1):
            prompts = self._prompts(batch, input_len)
            start = time.perf_counter()
            self.llm.generate(prompts, params, use_tqdm=False)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def decode_steps(self, batch: int, input_len: int, steps: int) -> list[float]:
        """Times of single steps while all requests of a batch decode."""
        engine = self.llm.engine
        ids = self._start(batch, input_len, UNWATCHED)
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        for name in ids:
            engine.abort(name)
        return times

    def stall(self, streams: int, length: int) -> dict[str, float]:
        """Time between tokens of `streams` answers, alone and while a prompt is computed."""
        engine = self.llm.engine
        ids = self._start(streams, 1024, ENDLESS)
        alone, beside, long = [], [], None
        for step in range(2000):
            if step == 50:
                engine.add_request("long", self._prompts(1, length)[0], ENDLESS)
                long = engine.scheduler.waiting[0]
            start = time.perf_counter()
            engine.step()
            elapsed = (time.perf_counter() - start) * 1e3
            (alone if long is None else beside).append(elapsed)
            if long is not None and long.output_token_ids:
                break
        for name in [*ids, "long"]:
            engine.abort(name)
        return {
            "streams": streams,
            "len": length,
            "alone_ms_median": statistics.median(alone[5:]),
            "beside_ms_median": statistics.median(beside),
            "beside_ms_max": max(beside),
            "ttft_ms": sum(beside),
        }

    def profile(
        self, directory: Path, input_len: int, batches: list[int], prefill: list[int] | None
    ) -> None:
        """Trace one prompt, some long ones, and decode steps of each batch."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level, options.host_tracer_level = 0, 2
        trace = functools.partial(jax.profiler.trace, profiler_options=options)
        self.repeats = 1
        with trace(directory / "prompt"):
            self.seconds(1, input_len, 1)
        if prefill:
            with trace(directory / "prefill"):
                self.seconds(min(prefill[0], 3), prefill[1], 1)
        for batch in batches:
            with trace(directory / f"decode_{batch}"):
                self.decode_steps(batch, input_len, 8)

    def _start(self, batch: int, input_len: int, params: SamplingParams) -> list[str]:
        """Step until all requests of a batch decode; return their ids."""
        engine = self.llm.engine
        ids = [f"bench-{i}" for i in range(batch)]
        for name, prompt in zip(ids, self._prompts(batch, input_len), strict=True):
            engine.add_request(name, prompt, params)
        while engine.scheduler.waiting or any(
            r.num_tokens == r.num_prompt_tokens for r in engine.scheduler.running
        ):
            engine.step()
        return ids

    def _prompts(self, batch: int, length: int) -> list[list[int]]:
        vocab = self.llm.engine.runner.model_config.vocab_size
        return self.rng.integers(0, vocab, (batch, length)).tolist()


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write the results so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
