"""Where the time of steps of several rounds goes when they verify a speculator's drafts.

    python scripts/gpu/rounds_profile.py --speculator FOLDER --rounds 4 --out DIR

One engine of random weights; `none` proposes nothing, `fixed` drafts always, `adaptive` as the
library does; `--speculator suffix` needs no folder. Random text has no right drafts, so that a
round's time is what a token takes.
"""

import argparse
import collections
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arctic_jax import LLM, SamplingParams
from arctic_jax.engine.runner import LaunchedStep
from arctic_jax.scheduled_batch import ScheduledBatch
from arctic_jax.spec_decode.proposer import NoProposer, build_proposer

TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="benchmarks/configs/smollm2-135m")
    parser.add_argument("--speculator", required=True)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    suffix = {"method": "suffix"}
    arctic = {"method": "arctic", "model": args.speculator}
    llm = LLM(
        args.model,
        load_format="dummy",
        max_model_len=8192,
        max_num_seqs=max(args.batches),
        num_scheduler_steps=args.rounds,
        speculative_config=suffix if args.speculator == "suffix" else arctic,
    )
    engine = llm.engine
    config = engine.config.speculative
    proposers = {
        "none": NoProposer,
        "fixed": lambda: build_proposer(replace(config, adaptive=False)),
        "adaptive": lambda: build_proposer(replace(config, adaptive=True)),
    }
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 3
    options.enable_hlo_proto = False
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    launch = engine.runner.launch
    for batch in args.batches:
        for name, make in proposers.items():
            for traced in (False, False, True):
                if traced and (name == "adaptive" or batch == 16):
                    continue
                engine.proposer = make()
                kinds: collections.Counter[str] = collections.Counter()
                hosts: list[float] = []

                def noted(
                    scheduled: ScheduledBatch, kinds: Any = kinds, hosts: list[float] = hosts
                ) -> LaunchedStep:
                    rounds, drafts = scheduled.num_rounds, " drafting" * scheduled.drafts
                    kinds[f"{rounds} x {scheduled.num_tokens}{drafts}"] += 1
                    start = time.perf_counter()
                    step = launch(scheduled)
                    hosts.append(time.perf_counter() - start)
                    return step

                engine.runner.launch = noted
                for i in range(batch):
                    prompt = rng.integers(0, 30_000, 64).tolist()
                    engine.add_request(str(i), prompt, params)
                running = engine.scheduler.running
                while engine.scheduler.waiting or any(not r.output_token_ids for r in running):
                    engine.step()
                kinds.clear()
                hosts.clear()
                if traced:
                    for _ in range(3):
                        engine.step()
                    with jax.profiler.trace(
                        str(args.out / f"trace_{batch}_{name}"), profiler_options=options
                    ):
                        for _ in range(4):
                            engine.step()
                before = [len(r.output_token_ids) for r in running]
                begin = time.perf_counter()
                threads = time.thread_time()
                each = max(TOKENS - sum(before) / max(len(before), 1), 1)
                while engine.has_requests:
                    engine.step()
                seconds = time.perf_counter() - begin
                threads = time.thread_time() - threads
                if not traced:
                    print(
                        f"{batch:3d} {name:9s} {seconds / each * 1e3:.3f} ms a token"
                        f"  thread {threads / each * 1e3:.3f}"
                        f"  launch {statistics.median(hosts) * 1e3:.3f} {dict(kinds)}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
