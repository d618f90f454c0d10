"""What speculation gains: tokens per second and per step, against the same engine without drafts.

    python benchmarks/speculation.py --methods suffix ngram --out FILE
    python benchmarks/speculation.py --data FOLDER --methods suffix ngram --out FILE
    python benchmarks/speculation.py --data FOLDER --speculator FOLDER \\
        --methods suffix arctic hybrid --out FILE

Workloads: `questions` (of `questions.jsonl` beside this file) and, with `--data`, `gsm8k`,
`humaneval` and `spec_bench` (chat prompts, greedy answers), and `agent`, recorded software agents:
each assistant turn is generated after its real history (the end of it, if all is too long) and
forced to be what was recorded (`forced_answers.py`). The turns of a conversation come one after the
other, with `--concurrency` conversations at a time; where that is more than there are, turns wait
for nobody. FOLDER is laid out as `prompts/{gsm8k_test,humaneval,spec_bench}.jsonl` and
`agent_trajectories/*.traj.json`.

The baseline is an engine without `speculative_config`. `suffix` and `hybrid` are what the
library does on this machine: on a GPU suffix decoding is a part of the step. `suffix_host` and
`hybrid_host` draft on the host everywhere, from other responses, too. `suffix_tree` drafts trees;
`--spec-offset` and `--min-token-prob` make drafts wider. Methods whose steps differ run in engines
of their own, each with the `--num-scheduler-steps` that it takes by itself if none are given. With
`--fixed`, each runs a second time without the adaptive policy.
"""

import argparse
import datetime
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from forced_answers import force

from arctic_jax import LLM, SamplingParams, __version__
from arctic_jax.config import LoadConfig
from arctic_jax.engine.core import EngineCore
from arctic_jax.loading.model_files import open_model
from arctic_jax.loading.tokenizer import Tokenizer
from arctic_jax.spec_decode.proposer import NoProposer, build_proposer
from arctic_jax.speculative_config import SpeculativeConfig
from arctic_jax.training.generate import read_prompts

MAX_SEED = 2**31 - 1
METHODS = ("suffix", "suffix_host", "suffix_tree", "ngram", "arctic", "hybrid", "hybrid_host")
QUESTIONS = Path(__file__).with_name("questions.jsonl")
OF_DATA = ("gsm8k", "humaneval", "spec_bench", "agent")
Job = tuple[list[int], list[int] | None]
"""A prompt, and the answer that is forced, if any."""
Conversations = list[list[tuple[int, Job]]]
"""Numbered jobs, of which those of a conversation wait for each other."""


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", default=["suffix", "ngram"], choices=METHODS)
    parser.add_argument("--speculator", default=None, help="for arctic and the hybrids")
    parser.add_argument("--workloads", nargs="+", choices=("questions", *OF_DATA))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=64, help="of a workload, at most")
    parser.add_argument(
        "--rounds", type=int, default=8, help="at most so many requests after one another"
    )
    parser.add_argument("--repeats", type=int, default=1, help="of each run; the median counts")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=16, help="of drafts of the host"
    )
    parser.add_argument("--spec-offset", type=float, default=0.0, help="of suffix drafts")
    parser.add_argument("--min-token-prob", type=float, default=0.1, help="of suffix drafts")
    parser.add_argument("--num-scheduler-steps", type=int, default=None)
    parser.add_argument("--num-blocks", type=int, default=None)
    parser.add_argument("--fixed", action="store_true", help="also without the adaptive policy")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    args.workloads = args.workloads or (OF_DATA if args.data else ["questions"])
    if args.data is None and args.workloads != ["questions"]:
        parser.error("--data: only the workload questions needs none")

    files = open_model(LoadConfig(args.model))
    work = {workload: load(workload, files.tokenizer, args) for workload in args.workloads}
    if "agent" in work:
        force([job for turns in work["agent"] for _, job in turns])
    rows: list[dict[str, Any]] = []
    for start, methods in engines(args):
        llm = LLM(
            args.model,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            max_num_seqs=max(args.concurrency),
            max_num_batched_tokens=args.max_num_batched_tokens,
            num_blocks=args.num_blocks,
            num_scheduler_steps=args.num_scheduler_steps,
            speculative_config=start,
        )
        engine: Any = llm.engine
        # What a speculator was made for is known to the engine now.
        given = {"num_speculative_tokens": engine.config.speculative.num_speculative_tokens}
        configs = {
            name: configured(user | given) if user else SpeculativeConfig()
            for name, user in methods.items()
        }
        if args.fixed:
            fixed = {f"{n}_fixed": replace(c, adaptive=False) for n, c in configs.items() if c.kind}
            configs |= fixed
        for workload in args.workloads:
            for concurrency, (method, config) in itertools.product(
                args.concurrency, configs.items()
            ):
                row = {"workload": workload, "concurrency": concurrency, "method": method}
                some = work[workload]
                if workload != "agent":
                    some = some[:: -(-len(some) // (args.rounds * concurrency))]
                elif concurrency > len(some):
                    some = [[turn] for turns in some for turn in turns]
                measure(engine, config, [some[0][:1]], 1, 8)  # what happens only once is over
                found = [
                    measure(engine, config, some, concurrency, args.max_tokens)
                    for _ in range(args.repeats)
                ]
                found.sort(key=lambda measured: measured["tokens_per_s"])
                rows.append(row | found[len(found) // 2])
                print(show(rows[-1], rows), flush=True)
                if args.out:
                    write(args.out, rows)
        del llm, engine  # the next engine wants the memory
        gc.collect()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what has been measured so far."""
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"arctic_jax": __version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def configured(user: dict[str, Any]) -> SpeculativeConfig:
    """Return what an engine makes of a user's settings here."""
    return SpeculativeConfig.from_user(user).on(jax.default_backend())


def engines(args: argparse.Namespace) -> Iterable[tuple[dict[str, Any] | None, dict[str, Any]]]:
    """Yield what an engine is started with, and the settings of each method that it can run."""
    suffix = {
        "method": "suffix",
        "suffix_max_spec_offset": args.spec_offset,
        "suffix_min_token_prob": args.min_token_prob,
    }
    speculator = {"method": "arctic", "model": args.speculator}
    hybrid = suffix | speculator | {"enable_suffix_decoding": True}
    on_host = {"suffix_on_device": False}
    settings = {
        "ngram": {"method": "ngram"},
        "suffix": suffix,
        "suffix_host": suffix | on_host,
        "suffix_tree": suffix | {"suffix_use_tree_spec": True},
        "arctic": speculator,
        "hybrid": hybrid,
        "hybrid_host": hybrid | on_host,
    }
    length = {"num_speculative_tokens": args.num_speculative_tokens}
    on_hosts, drafting, others = {}, {}, {}
    for name in args.methods:
        config = SpeculativeConfig.from_user(settings[name])
        if config.suffix_use_tree_spec:
            others[name] = settings[name] | length
        elif config.on(jax.default_backend()).suffix_on_device:
            others[name] = settings[name]
        else:
            (drafting if config.method == "arctic" else on_hosts)[name] = settings[name]
    yield None, {"none": None}
    if on_hosts:
        yield {"method": "ngram", **length}, on_hosts
    if drafting:
        yield hybrid | on_host, drafting
    for name, user in others.items():
        yield user, {name: user}


def load(workload: str, tokenizer: Tokenizer, args: argparse.Namespace) -> Conversations:
    """Return a workload's requests."""
    number = itertools.count()
    longest = args.max_model_len - args.max_tokens
    if workload == "agent":
        conversations: Conversations = []
        for path in sorted((args.data / "agent_trajectories").glob("*.traj.json")):
            turns = [(p[-longest:], a[: args.max_tokens]) for p, a in agent_turns(path, tokenizer)]
            conversations.append([(next(number), turn) for turn in turns])
        return conversations
    name = "gsm8k_test" if workload == "gsm8k" else workload
    file = QUESTIONS if workload == "questions" else args.data / "prompts" / f"{name}.jsonl"
    conversations = list(read_prompts([file]))
    # Of every kind of prompt, not those that come first.
    chosen = conversations[:: max(1, len(conversations) // args.requests)][: args.requests]
    template = tokenizer.apply_chat_template
    return [[(next(number), (list(template(messages))[:longest], None))] for messages in chosen]


def agent_turns(path: Path, tokenizer: Tokenizer) -> Iterable[tuple[list[int], list[int]]]:
    """Yield history and recorded answer of every assistant turn, as a ChatML conversation."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    context: list[int] = []
    for message in json.loads(path.read_text())["history"]:
        context += tokens(f"<|im_start|>{message['role']}\n")
        content = tokens(f"{message['content']}<|im_end|>")
        if message["role"] == "assistant" and message["content"]:
            yield context.copy(), content
        context += content + tokens("\n")


def measure(
    engine: EngineCore,
    config: SpeculativeConfig,
    conversations: Conversations,
    concurrency: int,
    longest: int,
) -> dict[str, Any]:
    """Run so many conversations at a time; return rates and what came of drafts."""
    engine.proposer = build_proposer(config) if config.kind else NoProposer()
    engine.reset_prefix_cache()
    waiting = [turns[::-1] for turns in conversations[::-1]]
    running: dict[str, list[tuple[int, Job]]] = {}  # with what is left of its conversation
    tokens = accepted = 0
    start = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < concurrency:
            turns = waiting.pop()
            i, (prompt, answer) = turns.pop()
            params = SamplingParams(
                temperature=0,
                max_tokens=len(answer) if answer else longest,
                ignore_eos=bool(answer),
                detokenize=not answer,
                seed=i if answer else MAX_SEED,  # see `forced_answers`
            )
            engine.add_request(str(i), prompt, params)
            running[str(i)] = turns
        for output in engine.step():
            if output.finished:
                turns = running.pop(output.request_id)
                waiting += [turns] if turns else []
                tokens += len(output.outputs[0].token_ids)
                accepted += output.metrics.num_accepted_tokens if output.metrics else 0
    seconds, stats = time.perf_counter() - start, engine.proposer.stats
    return {
        "requests": sum(map(len, conversations)),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "tokens_per_step": tokens / (tokens - accepted),
        "drafted": int(stats.drafted.sum()),
        "accepted": int(stats.accepted.sum()),
        "acceptance_by_position": np.round(
            stats.accepted / np.maximum(stats.drafted, 1), 3
        ).tolist(),
    }


def show(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    key = row["workload"], row["concurrency"]
    base = next(r for r in rows if (r["workload"], r["concurrency"]) == key)
    gain = row["tokens_per_s"] / base["tokens_per_s"]
    return (
        f"{row['workload']:10s} {row['concurrency']:4d} {row['method']:19s} "
        f"{row['tokens_per_s']:9.1f} tokens/s {gain:5.2f}x "
        f"{row['tokens_per_step']:5.2f} tokens/step "
        f"{row['accepted']}/{row['drafted']} accepted"
    )


if __name__ == "__main__":
    main()
