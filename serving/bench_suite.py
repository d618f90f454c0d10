"""`arctic-jax bench suite`: every benchmark of a checkout that fits the machine, and one report.

Each part is a script of `benchmarks/` in a process of its own, so that none finds another's memory
taken, and writes one JSON file. What is there already is not measured again.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import arctic_jax
from arctic_jax.config import DEFAULT_MODEL
from arctic_jax.serving import bench_report
from arctic_jax.serving.environment import host
from arctic_jax.serving.options import stderr, stdout

CHECKOUT = Path(arctic_jax.__file__).parents[1]
CONFIGS = "benchmarks/configs"


@dataclass(frozen=True)
class Machine:
    """What there is to measure on.

    Attributes:
        platform: "gpu" or "cpu".
        kind: of a device.
        count: devices.
    """

    platform: str
    kind: str
    count: int


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
        name: of its file, without ".json".
        script: in `benchmarks/`, without ".py".
        options: of the script, but where it writes.
        minutes: after which it is given up.
    """

    name: str
    script: str
    options: Sequence[object]
    minutes: float = 15

    def command(self, file: Path) -> list[str]:
        """Return what to run."""
        out = "--output" if self.script == "embeddings" else "--out"
        script = f"benchmarks/{self.script}.py"
        return [sys.executable, script, *map(str, self.options), out, str(file.resolve())]

    def command_anywhere(self) -> str:
        """Return the command without the folders of this machine, to stand beside the figures."""
        _, *command, _ = self.command(Path())
        return shlex.join(["python", *command, f"{self.name}.json"])


def parts_for(machine: Machine, data: Path | None) -> list[Part]:
    """Return the benchmarks for a machine; some want `data`, laid out as `speculation.py` says."""
    on_gpus = machine.platform == "gpu"
    parts = _parts_for_gpus(machine.count) if on_gpus else _parts_for_cpus()
    methods = ["--speculator", f"{DEFAULT_MODEL}-speculator"]
    methods += ["--methods", "suffix", "arctic", "hybrid"]
    few = ["--concurrency", 1, "--requests", 4, "--max-tokens", 48, "--max-model-len", 512]
    few += ["--max-num-batched-tokens", 256]
    asked = [*methods, *(["--concurrency", 1, 8, "--repeats", 3] if on_gpus else few)]
    parts.append(Part("speculation_questions", "speculation", asked))
    if data is None:
        return parts
    here = data.resolve()
    speculation = ["--data", here, "--methods", "suffix", "ngram"]
    parts.append(Part("speculation", "speculation", [*speculation, *([] if on_gpus else few)]))
    trajectories = here / "agent_trajectories"
    tokenizer = next(trajectories.glob("tokenizer.json"), None)
    if tokenizer is not None:
        options = ["--trajectories", trajectories, "--tokenizer", tokenizer]
        parts.append(Part("suffix_decoding", "suffix_decoding", options))
    return parts


def _parts_for_cpus() -> list[Part]:
    small = ["--max-model-len", 512, "--max-num-seqs", 8, "--max-num-batched-tokens", 256]
    offline = ["--model", DEFAULT_MODEL, *small, "--batches", 1, 8]
    offline += ["--input-len", 64, "--output-len", 32, "--prefill", 2, 256, "--throughput", 16]
    models = ["--base", "smollm2-135m-instruct-q4_1", "--swiftkv", "smollm2-135m-instruct-swiftkv"]
    swiftkv = [*models, *small, "--prefill", 2, 256, "--ttft-len", 256, "--batches", 1, 8]
    swiftkv += ["--decode-len", 64, 32, "--throughput", 8, "--throughput-len", 64, 32]
    embeddings = ["--model", "minilm-l6", "--lengths", 16, 128, 256, "--texts", 1, 64]
    traffic = ["--model", DEFAULT_MODEL, *small, "--seconds", 40, "--rate", 0.2, "--burst", 2]
    traffic += ["--prompt-len", 16, 128, "--output-len", 8, 32]
    return [
        Part("offline_smollm2-135m", "offline", offline),
        Part("swiftkv", "swiftkv", swiftkv),
        Part("embeddings", "embeddings", embeddings),
        Part("traffic", "traffic", traffic),
    ]


def _parts_for_gpus(count: int) -> list[Part]:
    llama = ["--model", f"{CONFIGS}/llama-3.1-8b", "--load-format", "dummy"]
    dummy = ["--load-format", "dummy"]
    whole = ["--batches", 1, 16, 64, 256, "--prefill", 8, 8192, "--throughput", 512]
    if count == 1:
        long = ["--max-model-len", 33000]
        stall = ["--stall", 32, 32768, "--repeats", 1]
        small = ["--max-model-len", 2048, "--max-num-seqs", 64, "--batches", 1, 64]
        names = ("qwen3-0.6b", "smollm2-135m")
        embedder = ["--model", f"{CONFIGS}/arctic-embed-m", *dummy, "--tokenizer", "minilm-l6"]
        texts = ["--lengths", 50, 512, 0, "--texts", "--tokens", 1_000_000, "--latency", 200]
        return [
            Part("offline_llama-3.1-8b", "offline", [*llama, *long, *stall, *whole]),
            Part("warm_start_llama-3.1-8b", "offline", [*llama, *long, "--batches"]),
            *(
                Part(f"offline_{n}", "offline", ["--model", f"{CONFIGS}/{n}", *dummy, *small])
                for n in names
            ),
            Part("swiftkv", "swiftkv", [*dummy, "--repeats", 2, "--throughput", 128]),
            Part("traffic", "traffic", [*llama, "--seconds", 40, "--rate", 2, "--burst", 20]),
            Part("embeddings_arctic-embed-m", "embeddings", [*embedder, *texts]),
            *(Part(f"kernels_{n}", "kernels", ["--operations", n]) for n in _operations()),
        ]
    several = ["--max-model-len", 8448, "--repeats", 1, *whole]
    bursts = ["--seconds", 40, "--rate", 5, "--burst", 60]
    ways = {
        "shift": ["--ulysses-sequence-parallel-size", count],
        "tp": ["--tensor-parallel-size", count],
        "sp": ["--ulysses-sequence-parallel-size", count, "--no-shift-parallel"],
    }
    replicas = {"dp": ["--data-parallel-size", count]}
    swiftkv = [*dummy, *ways["shift"], "--repeats", 2, "--throughput", 128]
    return [
        *(Part(f"offline_{n}", "offline", [*llama, *several, *way]) for n, way in ways.items()),
        *(
            Part(f"traffic_{n}", "traffic", [*llama, *bursts, *way])
            for n, way in (ways | replicas).items()
        ),
        Part("swiftkv", "swiftkv", swiftkv),
    ]


def _operations() -> list[str]:
    """Return the names of the operations that have cases, without importing JAX."""
    return sorted(path.parent.name for path in (CHECKOUT / "pallas_kernels").glob("*/cases.py"))


def suite(
    out: Annotated[Path, typer.Option(help="Folder for the figures and the report.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Parts by the beginning of their names; may be given again."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Prompts and recorded agents, see benchmarks/speculation.py."),
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of an earlier run, to show beside it; may be given again."),
    ] = None,
) -> None:
    """Run every benchmark that fits this machine, and write one report."""
    if not (CHECKOUT / "benchmarks" / "offline.py").is_file():
        raise ValueError(f"bench suite needs a checkout: {CHECKOUT} has no benchmarks")
    machine = find_machine()
    parts = parts_for(machine, data)
    if only:
        parts = [part for part in parts if part.name.startswith(tuple(only))]
    if not parts:
        raise ValueError(f"--only {', '.join(only or ())}: there is no such part")
    out.mkdir(parents=True, exist_ok=True)
    # A part must not go on, and take the GPU from the next, when the suite is ended by `kill`.
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    stderr.print(f"{machine.count} {machine.kind}: {len(parts)} parts into {out}")
    try:
        failed = run(parts, out)
    except KeyboardInterrupt:
        stderr.print("interrupted: the same command goes on with the part that was broken off")
        raise
    finally:
        signal.signal(signal.SIGTERM, terminate)
    report = bench_report.write(out, earlier or ())
    table = Table("part", "seconds")
    for part in parts:
        table.add_row(part.name, failed.get(part.name) or _seconds(out / f"{part.name}.json"))
    stdout.print(table)
    stdout.print(f"report: {report}")
    if failed:
        raise typer.Exit(1)


def run(parts: Sequence[Part], out: Path) -> dict[str, str]:
    """Run parts one after the other; return, by name, what went wrong.

    A part's output is beside its figures, in a file that ends with ".log".
    """
    failed = {}
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with Progress(console=stderr, transient=True) as progress:
        task = progress.add_task("", total=len(parts))
        for part in parts:
            progress.update(task, description=part.name)
            file = out / f"{part.name}.json"
            if not file.exists():
                why = _run(part, file, environment)
                if why is not None:
                    failed[part.name] = why
                    stderr.print(f"{part.name}: {why}, see {file.with_suffix('.log')}")
            progress.advance(task)
    return failed


def _run(part: Part, file: Path, environment: dict[str, str]) -> str | None:
    """Run a part; what a part that failed has written is no result."""
    unfinished = file.with_suffix(".unfinished")
    start = time.perf_counter()
    with file.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            part.command(unfinished), cwd=CHECKOUT, env=environment, stdout=log, stderr=log
        )
        try:
            code = process.wait(part.minutes * 60)
        except subprocess.TimeoutExpired:
            return f"not done after {part.minutes:g} minutes"
        finally:  # Ctrl-C, too
            process.kill()
            process.wait()
    if code or not unfinished.exists():
        return f"failed with code {code}"
    result = json.loads(unfinished.read_text())
    result |= {"command": part.command_anywhere(), "host": host()}
    result |= {"seconds": time.perf_counter() - start}
    file.write_text(_lines(result))
    unfinished.unlink()
    return None


def _lines(result: dict[str, Any]) -> str:
    """Return JSON with a line for each figure, and for each row of a table."""
    entries = []
    for key, value in result.items():
        is_table = isinstance(value, list) and all(isinstance(row, dict) for row in value)
        rows = ",\n  ".join(map(json.dumps, value)) if is_table else ""
        entries.append(f"{json.dumps(key)}: " + (f"[\n  {rows}\n ]" if rows else json.dumps(value)))
    return "{\n " + ",\n ".join(entries) + "\n}\n"


def _seconds(file: Path) -> str:
    return f"{json.loads(file.read_text())['seconds']:.0f}"


def find_machine() -> Machine:
    """Ask JAX, in a process of its own: it would take the GPU's memory in this one."""
    code = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind, sep='|')"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    platform, count, kind = said.stdout.strip().splitlines()[-1].split("|")
    return Machine(platform, kind, int(count))


def compare(
    before: Annotated[Path, typer.Argument(help="Folder of figures.")],
    after: Annotated[Path, typer.Argument(help="Folder of figures of the same kind of machine.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="A loss up to this share of the figure is noise.")
    ] = 0.05,
) -> None:
    """Compare two folders of figures; fail where the second has lost more than noise."""
    changes = bench_report.compare(bench_report.read(before), bench_report.read(after))
    if not changes:
        raise ValueError(f"{before} and {after} have no figure in common")
    table = Table("figure", "before", "after", "gain")
    losses = [change for change in changes if change.gain < -tolerance]
    notable = [change for change in changes if abs(change.gain) > tolerance]
    for change in notable:
        style = "red" if change in losses else None
        name = escape(change.name)  # its brackets are no markup
        row = (
            name,
            bench_report.show(change.before),
            bench_report.show(change.after),
            f"{change.gain:+.1%}",
        )
        table.add_row(*row, style=style)
    if notable:
        stdout.print(table)
    stdout.print(f"{len(changes)} figures, {len(losses)} lost more than {tolerance:.0%}")
    if losses:
        raise typer.Exit(1)
