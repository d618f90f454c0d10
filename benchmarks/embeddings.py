#!/usr/bin/env python3
"""Tokens a second of an embedding model over batch and length, and where the time goes.

    python benchmarks/embeddings.py --model minilm-l6 --output FILE.json

Each case is timed from strings to float32 rows on the host, and then part by part: tokenize, stage
(plan and pack the batches), device (from launching a batch until it is done), copy back. The parts
overlap when all is run together, so their sum may be more than the whole.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arctic_jax import LLM, host_copies
from arctic_jax.embedding.embedder import Embedder
from arctic_jax.embedding.packing import Packer
from arctic_jax.encoder_batch import pack
from arctic_jax.serving.embedding_engine import EmbeddingEngine
from arctic_jax.serving.environment import record

WORDS = (
    "the",
    "of",
    "river",
    "stone",
    "and",
    "to",
    "light",
    "in",
    "green",
    "old",
    "house",
    "paper",
)
MIXED = 0  # instead of a length
MEAN_OF_MIXED = 128  # tokens, nearly


def main() -> None:
    """Measure every case, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 50, 128, 256, MIXED])
    parser.add_argument("--texts", type=int, nargs="*", default=[1, 16, 256])
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[], help="cases with about so many tokens in all"
    )
    parser.add_argument(
        "--latency", type=int, default=0, help="time so many texts of each length, one at a time"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--tokenizer", help="for random weights")
    parser.add_argument("--implementation", help="of attention: xla or mosaic_gpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    llm = LLM(
        arguments.model,
        max_model_len=arguments.max_model_len,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        load_format=arguments.load_format,
        tokenizer=arguments.tokenizer,
        implementation=arguments.implementation,
    )
    rows = []
    print(f"{'length':>8}{'texts':>8}{'tokens/s':>12}   milliseconds")
    for length in arguments.lengths:
        mean = length or MEAN_OF_MIXED
        for count in [*arguments.texts, *(tokens // mean for tokens in arguments.tokens)]:
            rows.append(measure(llm, length, count, arguments.repeats))
            row = rows[-1]
            parts = "  ".join(f"{name} {ms:.2f}" for name, ms in row["milliseconds"].items())
            name = length or "mixed"
            print(f"{name:>8}{count:>8}{row['tokens_per_second']:12.0f}   {parts}", flush=True)
    report: dict[str, Any] = {"model": arguments.model, "dtype": str(llm.embedder.runner.dtype)}
    report |= {"implementation": arguments.implementation, "cases": rows}
    if arguments.latency:
        lengths = [length for length in arguments.lengths if length != MIXED]
        report["latency"] = asyncio.run(latencies(llm.embedder, lengths, arguments.latency))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report | record(), indent=2) + "\n")


def texts_of(length: int, count: int, longest: int) -> list[str]:
    """Texts of words that are a token each; of mixed lengths, log-normal from 16 on."""
    draw = random.Random(length)
    lengths = [
        length or min(max(int(draw.lognormvariate(4.5, 0.9)), 16), longest) for _ in range(count)
    ]
    return [" ".join(draw.choices(WORDS, k=n - 2)) for n in lengths]


def best(repeats: int, function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least milliseconds of some calls, and what the last one returned."""
    found, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        found.append((time.perf_counter() - start) * 1e3)
    return min(found), result


def measure(llm: LLM, length: int, count: int, repeats: int) -> dict[str, Any]:
    """Time one case."""
    runner, encoder = llm.embedder.runner, llm.embedder.text_encoder
    texts = texts_of(length, count, runner.max_length)
    llm.embed(texts, use_tqdm=False)
    whole, _ = best(repeats, lambda: llm.embed(texts, use_tqdm=False))
    tokenize, ids = best(repeats, lambda: encoder.encode(texts))

    def stage() -> list[Any]:
        packer, batches = Packer(runner.ladder), []
        packer.add((i, len(sequence)) for i, sequence in enumerate(ids))
        while plan := packer.take(rest=True):
            windows = [[ids[i] for i in window] for window in plan.windows]
            batches.append((pack(windows, plan.bucket), plan.bucket, len(plan.lengths)))
        return batches

    staging, batches = best(repeats, stage)
    device, done = best(
        repeats, lambda: jax.block_until_ready([runner.launch_packed(*batch) for batch in batches])
    )
    copy, _ = best(1, lambda: [host_copies.finish(vectors) for vectors in done])
    tokens = sum(map(len, ids))
    return {
        "length": length or "mixed",
        "texts": count,
        "tokens": tokens,
        "padding": 1 - tokens / sum(bucket.num_tokens for _, bucket, _ in batches),
        "tokens_per_second": tokens / whole * 1e3,
        "milliseconds": {
            "whole": whole,
            "tokenize": tokenize,
            "stage": staging,
            "device": device,
            "copy": copy,
        },
    }


def parts_of_latency(embedder: Embedder, texts: list[str]) -> dict[str, float]:
    """Return the median milliseconds of what happens to a lone text, step by step.

    Launch is the host's part of starting the programs, read what passes from then until the row is
    there; device is what a batch costs when many are launched one after another.
    """
    runner, found = embedder.runner, []
    ids: Any
    batch: Any = ()
    for text in texts:
        clock = [time.perf_counter()]
        (ids,) = embedder.text_encoder.encode([text])
        clock.append(time.perf_counter())
        packer = Packer(runner.ladder)
        packer.add([(0, len(ids))])
        plan = packer.take(rest=True)
        assert plan is not None
        batch = pack([[ids]], plan.bucket), plan.bucket, 1
        clock.append(time.perf_counter())
        vectors = runner.launch_packed(*batch)
        clock.append(time.perf_counter())
        host_copies.finish(vectors)
        clock.append(time.perf_counter())
        found.append(np.diff(clock) * 1e3)
    medians = np.median(found, axis=0).tolist()
    parts = dict(zip(("tokenize", "stage", "launch", "read"), medians, strict=True))
    many = range(30)
    device, _ = best(3, lambda: jax.block_until_ready([runner.launch_packed(*batch) for _ in many]))
    return parts | {"device": device / len(many)}


async def latencies(embedder: Embedder, lengths: list[int], count: int) -> list[dict[str, Any]]:
    """Time texts that are embedded one at a time through the engine for event loops.

    Its parts are timed without the engine: what is left of the whole is handing over.
    """
    engine, rows = EmbeddingEngine(embedder=embedder), []
    for length in lengths:
        found = []
        for text in texts_of(length, count + 20, embedder.runner.max_length):
            start = time.perf_counter()
            await engine.embed(text)
            found.append((time.perf_counter() - start) * 1e3)
        median, p99 = (float(np.percentile(found[20:], q)) for q in (50, 99))
        parts = parts_of_latency(embedder, texts_of(length, count, embedder.runner.max_length))
        rows.append({"length": length, "texts": count, "median_ms": median, "p99_ms": p99})
        rows[-1]["parts_ms"] = parts
        print(f"one text of {length} tokens at a time: {median:.2f} ms, 99 % within {p99:.2f}")
        print("  ".join(f"{name} {ms:.3f}" for name, ms in parts.items()), flush=True)
    engine.shutdown()
    return rows


if __name__ == "__main__":
    main()
