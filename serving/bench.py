"""`arctic-jax bench`: latency of one batch, throughput of many requests, layouts of a step.

What measures a server is in `bench_serve`.

The JSON of the first two has the keys of `vllm bench`.
"""

import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from arctic_jax.serving import bench_serve, bench_suite
from arctic_jax.serving.options import command, make_llm, stderr, stdout

if TYPE_CHECKING:
    from arctic_jax import LLM, RequestOutput, SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)

app = typer.Typer(help="Measure the engine.", no_args_is_help=True)
command(app, "serve")(bench_serve.bench_serve)
command(app, "suite")(bench_suite.suite)
command(app, "compare")(bench_suite.compare)

OutputJson = Annotated[Path | None, typer.Option(help="Write the figures to this file.")]


@command(app, "latency")
def latency(
    engine: dict[str, Any],
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Rounds not counted.")] = 10,
    num_iters: Annotated[int, typer.Option(min=1, help="Rounds counted.")] = 30,
    output_json: OutputJson = None,
) -> None:
    """Time a batch from its start to its last token."""
    import numpy as np

    from arctic_jax.engine.step_log import padding

    # The same prompts every round, as in vLLM: a prefix cache would answer all rounds but one.
    engine["enable_prefix_caching"] = False
    llm = make_llm(engine)
    prompts = _random_prompts(llm, batch_size, input_len, engine.get("seed", 0))
    params = _fixed_length(output_len)
    latencies = []
    for i in _track(range(num_iters_warmup + num_iters), "rounds"):
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if i >= num_iters_warmup:
            latencies.append(time.perf_counter() - start)
        _raise_failed(outputs)
    percentiles = {str(p): float(np.percentile(latencies, p)) for p in PERCENTILES}
    average = float(np.mean(latencies))
    results = {"avg_latency": average, "latencies": latencies, "percentiles": percentiles}
    rows = {"average": f"{average:.4f} s"}
    rows |= {f"p{p}": f"{value:.4f} s" for p, value in percentiles.items()}
    rows["output tokens/s"] = f"{batch_size * output_len / average:.1f}"
    rows["padding"] = f"{padding(llm.engine.step_logs):.1%} of the computed tokens"
    show(f"Latency: {batch_size} x ({input_len} in, {output_len} out)", rows)
    _write(output_json, results, engine)


@command(app, "throughput")
def throughput(
    engine: dict[str, Any],
    dataset_name: Annotated[str, typer.Option(help="random or custom.")] = "random",
    dataset_path: Annotated[
        Path | None,
        typer.Option(help='For custom: JSON lines {"prompt": …, "output_tokens": …}.'),
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a random prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many requests.")] = 1000,
    output_json: OutputJson = None,
) -> None:
    """Time many requests that all arrive at once."""
    if dataset_name not in ("random", "custom"):
        raise ValueError(f"--dataset-name must be random or custom, got {dataset_name!r}")
    if (dataset_path is None) != (dataset_name == "random"):
        raise ValueError(f"--dataset-path {dataset_path} does not go with {dataset_name!r}")
    from arctic_jax.engine.step_log import padding

    llm = make_llm(engine)
    if dataset_path is None:
        prompts = _random_prompts(llm, num_prompts, input_len, engine.get("seed", 0))
        lengths = [output_len] * num_prompts
    else:
        prompts, lengths = _read_dataset(dataset_path, num_prompts, output_len)
    params = [_fixed_length(length) for length in lengths]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=True)
    elapsed = time.perf_counter() - start
    _raise_failed(outputs)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    total = generated + sum(len(output.prompt_token_ids) for output in outputs)
    results = {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": total,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": total / elapsed,
        "total_output_tokens": generated,
        "output_tokens_per_second": generated / elapsed,
        "padding": padding(llm.engine.step_logs),
        **_times(outputs),
    }
    show(
        f"Throughput: {len(outputs)} requests of {dataset_name}",
        {name.replace("_", " "): f"{value:,.2f}" for name, value in results.items()},
    )
    _write(output_json, results, engine)


@command(app, "layouts")
def layouts(
    engine: dict[str, Any],
    again: Annotated[bool, typer.Option("--again", help="Measure even if it was before.")] = False,
    output_json: OutputJson = None,
) -> None:
    """Show how long a step takes in both layouts of shift parallelism, and where it shifts."""
    if engine["ulysses_sequence_parallel_size"] < 2 or not engine["enable_shift_parallel"]:
        raise ValueError(
            "there are two layouts only with --ulysses-sequence-parallel-size of at least 2 and "
            "--shift-parallel"
        )
    from arctic_jax.config import EngineConfig
    from arctic_jax.engine.core import EngineCore
    from arctic_jax.progress import bars

    engine["shift_parallel_threshold"] = None
    with bars() as report:
        runner = EngineCore(EngineConfig.from_keywords(**engine), report).runner
    crossover = runner.measure_crossover() if again else runner.crossover
    few, many = (layout.name for layout in runner.layouts)
    table = Table(title=f"Milliseconds a step; {few} up to {crossover.threshold} tokens")
    for column in ("tokens", few, many):
        table.add_column(column, justify="right")
    table.add_column(f"{few} ░, {many} █")
    longest = max(*crossover.few_ms, *crossover.many_ms)
    times = zip(crossover.few_ms, crossover.many_ms, strict=True)
    for tokens, (first, second) in zip(crossover.tokens, times, strict=True):
        bars = ["░" * round(30 * first / longest), "█" * round(30 * second / longest)]
        table.add_row(f"{tokens:,}", f"{first:.2f}", f"{second:.2f}", "\n".join(bars))
    stdout.print(table)
    results = {"layouts": [few, many], "crossover": asdict(crossover)}
    _write(output_json, results, engine)


def _random_prompts(llm: "LLM", count: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """Return prompts of random token ids, the same for the same seed."""
    vocabulary = len(llm.get_tokenizer())
    draw = random.Random(seed)
    return [{"prompt_token_ids": draw.choices(range(vocabulary), k=length)} for _ in range(count)]


def _read_dataset(path: Path, count: int, length: int) -> tuple[list[str], list[int]]:
    """Return the first prompts of a file and how many tokens each answer has."""
    lines = [line for line in path.read_text().splitlines() if line.strip()][:count]
    rows = [json.loads(line) for line in lines]
    if not rows or not all(isinstance(row, dict) and "prompt" in row for row in rows):
        raise ValueError(f'{path} must hold lines of JSON like {{"prompt": "..."}}')
    return [row["prompt"] for row in rows], [row.get("output_tokens") or length for row in rows]


def _fixed_length(tokens: int) -> "SamplingParams":
    from arctic_jax import SamplingParams

    return SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)


def _times(outputs: list["RequestOutput"]) -> dict[str, float]:
    """Return mean, median and 99th percentile of time to first token and time per further token."""
    import numpy as np

    first, further = [], []
    for output in outputs:
        times, tokens = output.metrics, len(output.outputs[0].token_ids)
        if times is None or times.first_token_time is None or times.last_token_time is None:
            continue
        first.append(times.first_token_time - times.arrival_time)
        if tokens > 1:
            further.append((times.last_token_time - times.first_token_time) / (tokens - 1))
    figures = {}
    for name, seconds in {"ttft": first, "tpot": further}.items():
        if seconds:
            figures[f"mean_{name}_ms"] = float(np.mean(seconds)) * 1e3
            figures[f"median_{name}_ms"] = float(np.median(seconds)) * 1e3
            figures[f"p99_{name}_ms"] = float(np.percentile(seconds, 99)) * 1e3
    return figures


def _raise_failed(outputs: list["RequestOutput"]) -> None:
    """A figure from requests that failed would be a wrong one."""
    errors = [answer.error for output in outputs for answer in output.outputs if answer.error]
    if errors:
        raise ValueError(f"{len(errors)} of {len(outputs)} requests failed: {errors[0]}")


def _track(rounds: range, what: str) -> Any:
    return track(rounds, description=what, console=stderr, transient=True)


def show(title: str, rows: dict[str, str]) -> None:
    """Print figures as a table."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    stdout.print(table)


def _write(path: Path | None, results: dict[str, Any], engine: dict[str, Any]) -> None:
    if path is None:
        return
    from arctic_jax.serving import environment

    path.parent.mkdir(parents=True, exist_ok=True)
    report = results | {"engine": engine, "environment": environment.record()}
    path.write_text(json.dumps(report, indent=2) + "\n")
    stderr.print(f"[dim]written to {path}[/]")
