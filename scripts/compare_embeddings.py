#!/usr/bin/env python3
"""Compare this engine's embeddings with sentence-transformers (torch, float32) on a CPU.

    scripts/compare_embeddings.py --model DIRECTORY --torch-python PYTHON

DIRECTORY is what `resolve_model("minilm-l6")` gives, loaded by both sides. PYTHON is an interpreter
that has torch and sentence-transformers; this one needs only this project. Both run at the same
time in the sense that every case is measured in turns, ours and theirs, by two processes of which
one always waits: what else the machine does then falls on both.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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
CASES = ("mixed lengths", "one text at a time", "equal lengths")


def main() -> None:
    arguments = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    if arguments.side:
        serve(arguments.side, arguments)
        return
    sides = {side: start(side, arguments) for side in ("ours", "theirs")}
    versions = {side: ask(process, "versions") for side, process in sides.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    for case in CASES:
        seconds[case] = {side: [] for side in sides}
        for number in range(arguments.rounds):
            for side in list(sides)[:: 1 if number % 2 else -1]:
                seconds[case][side].append(ask(sides[side], case))
                print(f"{case}, {side}: {seconds[case][side][-1]:.2f} s", file=sys.stderr)
    vectors = {side: ask(process, "vectors") for side, process in sides.items()}
    for process in sides.values():
        process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        process.wait()
    report = summarize(seconds, vectors, versions, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.output}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--torch-path", default="", help="PYTHONPATH of that interpreter")
    parser.add_argument("--dtype", default="auto", help="ours; theirs is float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--num-texts", type=int, default=2000, help="of mixed lengths")
    default = ROOT / "benchmarks/results/cpu/compare_embeddings.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    return parser.parse_args()


def texts_of(case: str, num_texts: int) -> list[str]:
    """Texts whose words are a token each: log-normal lengths of 16 to 256, or all of one length."""
    draw = random.Random(0)
    if case == "mixed lengths":
        lengths = [min(max(int(draw.lognormvariate(4.0, 0.8)), 16), 256) for _ in range(num_texts)]
    elif case == "one text at a time":
        lengths = [min(max(int(draw.lognormvariate(3.5, 0.6)), 10), 256) for _ in range(64)]
    else:
        lengths = [256] * max(32, num_texts // 10)
    return [" ".join(draw.choices(WORDS, k=length - 2)) for length in lengths]


def start(side: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a side's process."""
    python = sys.executable if side == "ours" else arguments.torch_python
    command = [python, str(Path(__file__).resolve()), *sys.argv[1:], "--side", side]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    environment["PYTHONPATH"] = str(ROOT) if side == "ours" else arguments.torch_path
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: subprocess.Popen[str], question: str) -> Any:
    """Send a line to a side, and read lines until one is the answer."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("a side without pipes")
    process.stdin.write(question + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("answer "):
            return json.loads(line.removeprefix("answer "))
    raise SystemExit(f"{process.args} has ended")


def serve(side: str, arguments: argparse.Namespace) -> None:
    """Answer the questions on standard input: a side's process."""
    embed, versions = (load_ours if side == "ours" else load_theirs)(arguments)
    embed(texts_of("mixed lengths", 50))  # not timed
    for line in sys.stdin:
        question = line.strip()
        if question == "versions":
            answer: Any = versions
        elif question == "vectors":
            answer = [[float(x) for x in row] for row in embed(texts_of("mixed lengths", 50))]
        else:
            texts = texts_of(question, arguments.num_texts)
            batches = [[text] for text in texts] if question == "one text at a time" else [texts]
            begin = time.perf_counter()
            for batch in batches:
                embed(batch)
            answer = time.perf_counter() - begin
        print(f"answer {json.dumps(answer)}", flush=True)


Embed = Callable[[list[str]], Any]


def load_ours(arguments: argparse.Namespace) -> tuple[Embed, dict[str, str]]:
    from arctic_jax import LLM
    from arctic_jax.serving.environment import versions

    llm = LLM(str(arguments.model), dtype=arguments.dtype, progress=False)
    return lambda texts: llm.embed(texts, use_tqdm=False), versions()


def load_theirs(arguments: argparse.Namespace) -> tuple[Embed, dict[str, str]]:
    import sentence_transformers
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    model = sentence_transformers.SentenceTransformer(str(arguments.model), device="cpu")
    modules = {"torch": torch, "transformers": transformers}
    versions = {name: module.__version__ for name, module in modules.items()}
    versions["sentence-transformers"] = sentence_transformers.__version__
    return lambda texts: model.encode(texts, show_progress_bar=False), versions


def summarize(
    seconds: dict[str, dict[str, list[float]]],
    vectors: dict[str, Any],
    versions: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Take the best time of each side and case; print a table."""
    from arctic_jax.serving.environment import record

    cases = {}
    print(f"{'tokens/s':24}{'ours':>10}{'theirs':>10}{'ratio':>8}{'by medians':>12}")
    for case, both in seconds.items():
        texts = texts_of(case, arguments.num_texts)
        tokens = sum(text.count(" ") + 3 for text in texts)
        ours, theirs = (tokens / min(both[side]) for side in ("ours", "theirs"))
        medians = statistics.median(both["theirs"]) / statistics.median(both["ours"])
        cases[case] = {
            "texts": len(texts),
            "tokens": tokens,
            "ours": ours,
            "theirs": theirs,
            "ratio": ours / theirs,
            "ratio_of_medians": medians,
            "seconds": both,
        }
        print(f"{case:24}{ours:10.0f}{theirs:10.0f}{ours / theirs:8.2f}{medians:12.2f}")
    pairs = zip(vectors["ours"], vectors["theirs"], strict=True)
    least = min(sum(x * y for x, y in zip(a, b, strict=True)) for a, b in pairs)
    print(f"least cosine of 50 texts: {least:.7f}")
    environment = record()
    return {
        "model": arguments.model.resolve().name,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "load_average": os.getloadavg()[0],
        "cases": cases,
        "least_cosine": least,
        "versions": versions,
        **{key: environment[key] for key in ("date", "host")},
    }


if __name__ == "__main__":
    main()
