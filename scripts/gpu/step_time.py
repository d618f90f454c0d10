"""Where the time of a decode step goes: packing, dispatch, device, reading back.

    python scripts/gpu/step_time.py --batches 1 16 64 256 --out DIR
    python scripts/gpu/step_time.py --batches 1 16 64 --drafts 0 3 8 16 --out DIR

Decode steps of the dummy Llama-3.1-8B at a context of 1,024. `whole` is `EngineCore.step`, `host`
what its thread computes for it, waiting left out; `pack` and `dispatch` (packing within it) are
parts of that; `device` is the time of a step when many are
started one after the other without reading their results. With `--drafts`, those verify so many
drafted tokens of each sequence; a step holds at most 256 of them. With `--suffix`, steps draft for
the next one, too, by suffix decoding on the device.
"""

import argparse
import datetime
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib
import numpy as np

from arctic_jax import LLM, SamplingParams, host_copies
from arctic_jax.request import RequestOutputKind
from arctic_jax.scheduled_batch import ScheduledBatch, ScheduledRequest


def median_ms(
    run: Callable[[], object], repeats: int = 20, clock: Callable[[], float] = time.perf_counter
) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="benchmarks/configs/llama-3.1-8b")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--drafts", type=int, nargs="*", default=[0])
    parser.add_argument("--suffix", action="store_true")
    parser.add_argument("--prefill", type=int, help="with --trace: tokens of a prefill step")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="profile the steps, into OUT")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 3
    options.enable_hlo_proto = False  # half a gigabyte
    llm = LLM(
        args.model,
        load_format="dummy",
        max_model_len=args.max_model_len,
        max_num_seqs=max(args.batches),
        max_num_batched_tokens=max(4096, args.prefill or 0),
        enable_prefix_caching=False,
        tensor_parallel_size=args.tensor_parallel_size,
        # Proposes nothing in random text: the verifying programs are what is wanted.
        speculative_config={
            "method": "suffix" if args.suffix else "ngram",
            "num_speculative_tokens": max(args.drafts),
        }
        if max(args.drafts)
        else None,
    )
    engine, runner = llm.engine, llm.engine.runner
    rng = np.random.default_rng(0)
    # Nobody looks on, so prompts are computed in full steps, and contexts are about equal.
    params = SamplingParams(
        temperature=0,
        max_tokens=None,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    rows = []
    for batch in args.batches:
        for i in range(batch):
            prompt = rng.integers(0, runner.model_config.vocab_size, args.context).tolist()
            engine.add_request(str(i), prompt, params)
        running = engine.scheduler.running
        while engine.scheduler.waiting or any(not r.output_token_ids for r in running):
            engine.step()
        whole = median_ms(engine.step)
        host = median_ms(engine.step, clock=time.thread_time)
        plain = [(0, False)] if args.suffix else []  # beside steps that draft, one that does not
        for drafted, drafts in [*plain, *((drafted, args.suffix) for drafted in args.drafts)]:
            scheduled = ScheduledBatch(
                # The last tokens, as if they were drafted: their blocks are there.
                tuple(
                    ScheduledRequest(
                        r,
                        r.num_computed_tokens - 1 - drafted,
                        1 + drafted,
                        1 + drafted,
                        True,
                        drafted,
                    )
                    for r in running
                ),
                drafts,
            )
            if scheduled.num_drafted > runner.max_extra_rows:
                continue
            _, bucket = runner.picker.pick(scheduled)
            pack = median_ms(lambda s=scheduled, b=bucket: runner.packer.pack(s, b))

            def launch(s: ScheduledBatch = scheduled) -> jax.Array:
                return runner.launch(s).output

            dispatches = []
            for _ in range(10):
                start = time.perf_counter()
                output = launch()
                dispatches.append((time.perf_counter() - start) * 1e3)
                jax.block_until_ready(output)
            start = time.perf_counter()
            jax.block_until_ready([launch() for _ in range(30)])
            device = (time.perf_counter() - start) / 30 * 1e3
            alone = median_ms(lambda launch=launch: host_copies.finish(launch()))
            row = {
                "batch": batch,
                "drafted": drafted,
                "drafts": drafts,
                "whole": whole,
                "host": host,
                "pack": pack,
                "dispatch": statistics.median(dispatches),
                "device": device,
                "launch_and_read": alone,
            }
            rows.append(row)
            print("  ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
            if args.trace:
                with jax.profiler.trace(
                    str(args.out / f"trace_{batch}_{drafted}_{drafts:d}"), profiler_options=options
                ):
                    jax.block_until_ready([launch() for _ in range(4)])
        for i in range(batch):
            engine.abort(str(i))
    if args.trace and args.prefill:
        prompts = rng.integers(0, runner.model_config.vocab_size, (3, args.prefill)).tolist()
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, params)
        engine.step()
        with jax.profiler.trace(str(args.out / "trace_prefill"), profiler_options=options):
            engine.step()
            engine.step()
    document = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "device": jax.devices()[0].device_kind,
        "model": args.model,
        "context": args.context,
        "weight_bytes": sum(leaf.nbytes for leaf in runner.leaves[runner.layouts[-1]]),
        "cache_bytes_per_token": runner.cache_spec.bytes_per_block // runner.cache_spec.block_size,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step_time.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
