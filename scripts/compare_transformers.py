#!/usr/bin/env python3
"""Compare this engine with transformers + torch on a CPU: decoding and prefill, float32.

    scripts/compare_transformers.py --model DIRECTORY --torch-python PYTHON

DIRECTORY holds config.json, safetensors and tokenizer files, and is loaded by both sides. PYTHON is
an interpreter that has torch and transformers; this one needs only this project. The sides take
turns, in rounds, each in a process of its own on the same cores, through their public `generate`.
Decoding is timed as the difference between a long and a one-token answer, so that neither side's
prefill counts. Prompts are the same random token ids on both sides.
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
Generate = Callable[[list[list[int]], int], list[list[int]]]
"""From prompts and a number of tokens to exactly so many tokens of each."""


def main() -> None:
    arguments = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for number in range(arguments.rounds):
        sides = ["ours", "theirs"]
        for side in sides if number % 2 == 0 else reversed(sides):
            print(f"round {number + 1}/{arguments.rounds}: {side}", file=sys.stderr, flush=True)
            rounds[side].append(in_subprocess(side, arguments))
    report = summarize(rounds, arguments)
    print_table(report)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.output}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="of each case, within a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--input-len", type=int, default=32, help="of the decode cases")
    parser.add_argument("--output-len", type=int, default=64, help="of the decode cases")
    parser.add_argument("--prefill-len", type=int, default=1024)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    default = ROOT / "benchmarks/results/cpu/compare_transformers.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    return parser.parse_args()


def in_subprocess(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in the side's interpreter."""
    python = sys.executable if side == "ours" else arguments.torch_python
    command = [python, str(Path(__file__).resolve()), *sys.argv[1:], "--side", side]
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(arguments.threads)
    if side == "ours":
        environment["PYTHONPATH"] = str(ROOT)
        environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second of every case, the versions, and some tokens to compare."""
    start = time.perf_counter()
    generate, versions = (load_ours if side == "ours" else load_theirs)(arguments)
    figures: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [draw.choices(range(vocabulary), k=length) for _ in range(count)]

    def seconds(batch: list[list[int]], tokens: int) -> float:
        start = time.perf_counter()
        generate(batch, tokens)
        return time.perf_counter() - start

    tokens: list[list[int]] = []
    for size in arguments.batch_sizes:
        batch = prompts(size, arguments.input_len)
        tokens += generate(batch, arguments.output_len + 1)  # not timed
        generate(batch, 1)
        rates = []
        for _ in range(arguments.repeats):
            first = seconds(batch, 1)
            rates.append(
                size * arguments.output_len / (seconds(batch, arguments.output_len + 1) - first)
            )
        figures[f"decode tokens/s, batch {size}"] = rates
    batch = prompts(1, arguments.prefill_len)
    generate(batch, 1)
    figures[f"prefill tokens/s, {arguments.prefill_len} tokens"] = [
        arguments.prefill_len / seconds(batch, 1) for _ in range(arguments.repeats)
    ]
    return {"figures": figures, "versions": versions, "tokens": tokens}


def load_ours(arguments: argparse.Namespace) -> tuple[Generate, dict[str, str]]:
    """Load the model with this engine.

    Without the prefix cache: with it, every prefill but the first would cost nothing.
    """
    from arctic_jax import LLM, SamplingParams
    from arctic_jax.serving.environment import versions

    llm = LLM(
        str(arguments.model),
        dtype="float32",
        enable_prefix_caching=False,
        max_model_len=max(arguments.prefill_len, arguments.input_len + arguments.output_len) + 64,
        progress=False,
    )

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, versions()


def load_theirs(arguments: argparse.Namespace) -> tuple[Generate, dict[str, str]]:
    """Load the model with transformers."""
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None  # every answer has its full length

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return output[:, ids.shape[1] :].tolist()

    names = {"python": sys.version.split()[0], "torch": torch.__version__}
    return generate, names | {"transformers": transformers.__version__}


def summarize(
    rounds: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Take medians over all rounds and repeats; keep the single figures beside them."""
    sys.path.insert(0, str(ROOT))
    from arctic_jax.serving.environment import record

    cases = {}
    for case in rounds["ours"][0]["figures"]:
        both = {}
        for side, results in rounds.items():
            values = [result["figures"][case] for result in results]
            both[side] = [
                v for value in values for v in (value if type(value) is list else [value])
            ]
        ours, theirs = (statistics.median(both[side]) for side in ("ours", "theirs"))
        cases[case] = {"ours": ours, "theirs": theirs, "ratio": ours / theirs, "all": both}
    pairs = zip(rounds["ours"][0]["tokens"], rounds["theirs"][0]["tokens"], strict=True)
    environment = record()
    return {
        "model": arguments.model.resolve().name,
        "threads": arguments.threads,
        "cases": cases,
        "answers_equal": [ours == theirs for ours, theirs in pairs],
        "versions": {side: results[0]["versions"] for side, results in rounds.items()},
        **{key: environment[key] for key in ("date", "host")},
    }


def print_table(report: dict[str, Any]) -> None:
    print(f"{'':32}{'ours':>10}{'theirs':>10}{'ratio':>8}")
    for case, figures in report["cases"].items():
        print(f"{case:32}{figures['ours']:10.1f}{figures['theirs']:10.1f}{figures['ratio']:8.2f}")
    equal = report["answers_equal"]
    print(f"greedy answers that are equal: {sum(equal)} of {len(equal)}")


if __name__ == "__main__":
    main()
