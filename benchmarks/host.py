"""What the host computes for a step of many requests, of a model that costs next to nothing.

    python benchmarks/host.py --requests 256 --out FILE

Milliseconds of the engine's thread alone (waiting for the device, and what other threads do, left
out) for a step in which every request gets a token, and for the parts of it. Streaming, each
request's user gets what is new after every step, as in a server. Last, the time of a step, all
threads together, when each stream is read by a task of an event loop.
"""

import argparse
import asyncio
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arctic_jax import LLM, SamplingParams, __version__
from arctic_jax.engine.core import EngineCore
from arctic_jax.request import RequestOutputKind
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.environment import host
from arctic_jax.testing import write_model


def main() -> None:
    """Measure both kinds of output, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            write_model(folder),
            max_model_len=512,
            max_num_seqs=args.requests,
            max_num_batched_tokens=2 * args.requests,
        )
    rows = []

    def note(output: str, part: str, times: list[float]) -> None:
        row = {"median_ms": statistics.median(times), "least_ms": min(times)}
        rows.append({"output": output, "part": part} | row)
        print(f"{output:10}  {part:8}  {row['median_ms']:6.3f} ms, least {row['least_ms']:6.3f}")

    kinds = {"at the end": RequestOutputKind.FINAL_ONLY, "streaming": RequestOutputKind.DELTA}
    for name, kind in kinds.items():
        for part, times in measure(llm.engine, kind, args.requests, args.steps).items():
            note(name, part, times)
    note("event loop", "step", asyncio.run(read(llm.engine, args.requests, args.steps)))
    if args.out:
        document = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "versions": {"arctic_jax": __version__, "jax": jax.__version__},
            "device": jax.devices()[0].device_kind,
            "host": host(),
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")


def measure(
    engine: EngineCore, kind: RequestOutputKind, requests: int, steps: int
) -> dict[str, list[float]]:
    """Return the times of steps and their parts, in milliseconds."""
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, output_kind=kind)
    rng = np.random.default_rng(0)
    for i in range(requests):
        engine.add_request(str(i), rng.integers(5, 250, 16).tolist(), params)
    while engine.scheduler.waiting or any(not r.output_token_ids for r in engine.scheduler.running):
        engine.step()
    times: dict[str, list[float]] = defaultdict(list)
    parts = [
        (engine.scheduler, "schedule"),
        (engine.runner, "launch"),
        (engine.runner.packer, "pack"),
        (engine.outputs, "accept"),
    ]
    for owner, name in parts:
        setattr(owner, name, timed(getattr(owner, name), times[name]))
    step = timed(engine.step, times["step"])
    for _ in range(steps):
        step()
    for owner, name in parts:
        delattr(owner, name)
    for i in range(requests):
        engine.abort(str(i))
    return times


async def read(engine: EngineCore, requests: int, steps: int, rounds: int = 3) -> list[float]:
    """Return the mean time of a step in each round, in milliseconds."""
    params = SamplingParams(
        temperature=0, max_tokens=steps, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    readable = AsyncEngine(engine=engine)

    async def stream() -> None:
        async for _ in readable.generate({"prompt_token_ids": [5] * 16}, params):
            pass

    times = []
    for _ in range(rounds):
        begin, before = time.perf_counter(), engine.num_steps
        await asyncio.gather(*(stream() for _ in range(requests)))
        times.append((time.perf_counter() - begin) / (engine.num_steps - before) * 1e3)
    readable.shutdown()
    return times


def timed(function: Any, times: list[float]) -> Any:
    """Return the function, made to note how long its thread computes."""

    def call(*arguments: Any) -> Any:
        begin = time.thread_time()
        try:
            return function(*arguments)
        finally:
            times.append((time.thread_time() - begin) * 1e3)

    return call


if __name__ == "__main__":
    main()
