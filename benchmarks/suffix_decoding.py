"""Suffix decoding replayed over recorded conversations: latencies, memory, tokens per step.

    python benchmarks/suffix_decoding.py --trajectories FOLDER --tokenizer FILE --out FILE
    python benchmarks/suffix_decoding.py --compare-trees --trajectories FOLDER \
        --answers gsm8k_test.jsonl humaneval.jsonl --max-spec-tokens 16 --tokenizer FILE --out FILE

Every assistant turn of every `*.traj.json` (SWE-agent's format: `history` with roles) is a request:
its prompt is what came before, its response what was recorded. A step drafts, accepts what agrees
with the record, and takes one recorded token more; the cache outlives the conversations.
`--module` replays with another package's `SuffixDecodingCache`, e.g. arctic_inference's.

`--compare-trees` asks instead what trees would gain over paths: tokens per step, and rows of logits
(the drafted tokens, and one more), for drafts of several widths. `--answers` are files of questions
with answers, which are replayed like turns.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

PACKAGES = ("arctic-jax", "arctic-inference", "numba", "numpy", "tokenizers")


def main() -> None:
    """Replay, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--answers", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--module", default="arctic_jax.spec_decode")
    parser.add_argument("--max-tree-depth", type=int, default=64)
    parser.add_argument("--max-cached-requests", type=int, default=-1)
    parser.add_argument("--max-prompt-len", type=int, default=8000)
    parser.add_argument("--max-spec-tokens", type=int, default=64)
    parser.add_argument("--max-spec-factor", type=float, default=1.0)
    parser.add_argument("--max-spec-offset", type=float, default=0.0)
    parser.add_argument("--min-token-prob", type=float, default=0.1)
    parser.add_argument("--use-tree-spec", action="store_true")
    parser.add_argument("--compare-trees", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    turns = load_turns(args.trajectories, args.tokenizer, args.max_prompt_len)
    make = importlib.import_module(args.module).SuffixDecodingCache
    start = time.perf_counter()
    cache = make(args.max_tree_depth, args.max_cached_requests)
    figures: dict[str, Any] = {"ready_s": time.perf_counter() - start}
    if args.compare_trees:
        workloads = {"agent": turns}
        workloads |= {path.stem: load_answers(path, args.tokenizer) for path in args.answers}
        figures["drafts"] = list(compare_trees(make, workloads, args))
    else:
        figures |= Replay(cache, args.max_spec_tokens, drafting(args)).run(turns)
        figures["memory_bytes_per_token"] = memory_per_token(
            args.module, args.max_tree_depth, turns
        )
        for name, value in figures.items():
            print(f"{name:28s} {value:12.2f}")
    if args.out:
        settings = {
            name: value for name, value in vars(args).items() if not isinstance(value, Path | list)
        }
        result = {
            "date": datetime.date.today().isoformat(),
            "settings": settings,
            "versions": {"python": platform.python_version(), **versions()},
            "cpu": cpu_name(),
            "vocabulary": Tokenizer.from_file(str(args.tokenizer)).get_vocab_size(),
            "figures": figures,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def load_turns(
    folder: Path, tokenizer_file: Path, max_prompt_len: int
) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Return (prompt, response) of all assistant turns, as tokens of a ChatML conversation."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    turns = []
    for path in sorted(folder.glob("*.traj.json")):
        context: list[int] = []
        for message in json.loads(path.read_text())["history"]:
            context += tokens(f"<|im_start|>{message['role']}\n")
            content = tokens(f"{message['content']}<|im_end|>")
            if message["role"] == "assistant":
                prompt = np.array(context[-max_prompt_len:], np.int32)
                turns.append((prompt, np.array(content, np.int32)))
            context += content + tokens("\n")
    return turns


def load_answers(
    path: Path, tokenizer_file: Path
) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Return (question, answer) of every line of a file, as tokens."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def tokens(text: str) -> np.ndarray[Any, Any]:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    found = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        prompt, answer = (
            next(entry[key] for key in keys if key in entry)
            for keys in (("question", "prompt"), ("answer", "canonical_solution"))
        )
        found.append((tokens(prompt), tokens(answer)))
    return found


def drafting(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of `speculate` but for the most tokens."""
    names = ("max_spec_factor", "max_spec_offset", "min_token_prob", "use_tree_spec")
    return {name: getattr(args, name) for name in names}


def compare_trees(
    make: Any, workloads: dict[str, list[tuple[Any, Any]]], args: argparse.Namespace
) -> Iterable[dict[str, Any]]:
    """Yield what paths and trees of several widths gain, each with a cache of its own."""
    print(f"{'':12s} {'offset':>6s} {'probability':>11s}    path          tree  (rows a step)")
    for (name, turns), offset, prob in itertools.product(
        workloads.items(), (0.0, 4.0, 8.0), (0.1, 0.03)
    ):
        row: dict[str, Any] = {"workload": name, "max_spec_offset": offset, "min_token_prob": prob}
        shown = []
        for kind in ("path", "tree"):
            keywords = drafting(args) | {
                "max_spec_offset": offset,
                "min_token_prob": prob,
                "use_tree_spec": kind == "tree",
            }
            cache = make(args.max_tree_depth, args.max_cached_requests)
            figures = Replay(cache, args.max_spec_tokens, keywords).run(turns)
            row[kind] = {
                "tokens_per_step": round(figures["tokens_per_step"], 4),
                "rows_per_step": round(figures["rows_per_step"], 2),
            }
            shown.append("{tokens_per_step:6.3f} ({rows_per_step:4.1f})".format(**row[kind]))
        print(f"{name:12s} {offset:6.0f} {prob:11.2f}  ", "  ".join(shown), flush=True)
        yield row


class Replay:
    """Runs recorded turns through a cache, and takes the times."""

    def __init__(self, cache: Any, max_spec_tokens: int, keywords: dict[str, Any]) -> None:
        self.cache = cache
        self.max_spec_tokens = max_spec_tokens
        self.keywords = keywords
        self.speculate_s: list[float] = []
        self.append_s: list[float] = []
        self.start_s = self.stop_s = 0.0
        self.drafted = 0

    def run(self, turns: list[tuple[Any, Any]]) -> dict[str, float]:
        """Return the figures of all turns, each a request after the other."""
        for i, (prompt, response) in enumerate(turns):
            start = time.perf_counter()
            self.cache.start_request(i, prompt)
            self.start_s += time.perf_counter() - start
            self._respond(i, np.concatenate([prompt, response]), len(prompt))
            start = time.perf_counter()
            self.cache.stop_request(i)
            self.stop_s += time.perf_counter() - start
        responses = sum(len(response) for _, response in turns)
        prompts = sum(len(prompt) for prompt, _ in turns)
        p50, p95, top = np.percentile(self.speculate_s, [50, 95, 100]) * 1e6
        steps = len(self.speculate_s)
        return {
            "turns": len(turns),
            "response_tokens": responses,
            "prompt_tokens": prompts,
            "tokens_per_step": responses / steps,
            "rows_per_step": 1 + self.drafted / steps,
            "acceptance": (responses - steps) / max(1, self.drafted),
            "speculate_p50_us": p50,
            "speculate_p95_us": p95,
            "speculate_max_us": top,
            "append_us_per_token": sum(self.append_s) / responses * 1e6,
            "start_us_per_prompt_token": self.start_s / prompts * 1e6,
            "stop_us_per_token": self.stop_s / (prompts + responses) * 1e6,
        }

    def _respond(self, req_id: int, tokens: np.ndarray[Any, Any], length: int) -> None:
        """Produce the rest of a request's tokens step by step."""
        while length < len(tokens):
            context = tokens[max(0, length - self.cache.max_tree_depth) : length]
            start = time.perf_counter()
            draft = self.cache.speculate(req_id, context, self.max_spec_tokens, **self.keywords)
            self.speculate_s.append(time.perf_counter() - start)
            self.drafted += len(draft.token_ids)
            new = tokens[length : length + accepted(draft, tokens[length:]) + 1]
            start = time.perf_counter()
            self.cache.add_active_response(req_id, new)
            self.append_s.append(time.perf_counter() - start)
            length += len(new)


def accepted(draft: Any, expected: np.ndarray[Any, Any]) -> int:
    """How many drafted tokens agree with what comes; the last one is left to the model."""
    children = {
        (p, t): i for i, (p, t) in enumerate(zip(draft.parents, draft.token_ids, strict=True))
    }
    node, count = -1, 0
    for token in expected[:-1].tolist():
        if (node, token) not in children:
            break
        node = children[node, token]
        count += 1
    return count


def memory_per_token(module: str, max_tree_depth: int, turns: list[tuple[Any, Any]]) -> float:
    """Bytes a fresh process grows by for each token of a prompt, all prompts' trees at once."""
    prompts = [prompt for prompt, _ in turns]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        grown = process.submit(memory_of, module, max_tree_depth, prompts).result()
    return grown / sum(map(len, prompts))


def memory_of(module: str, max_tree_depth: int, prompts: list[Any]) -> int:
    """Bytes this process grows by."""
    cache = importlib.import_module(module).SuffixDecodingCache(max_tree_depth, 0)
    before = resident_bytes()
    for i, prompt in enumerate(prompts):
        cache.start_request(i, prompt)
    return resident_bytes() - before


def resident_bytes() -> int:
    """Memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's model."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


if __name__ == "__main__":
    main()
