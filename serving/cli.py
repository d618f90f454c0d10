"""The command line `arctic-jax`: generate, chat, embed, convert, bench, swiftkv, speculator, ...

Runs in the user's terminal; everything it does goes through `LLM`. JAX and transformers are
imported inside the commands, so that `--help` answers at once.
"""

import contextlib
import dataclasses
import faulthandler
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from arctic_jax.serving import bench, embedding, serve, speculator, training
from arctic_jax.serving.options import command, make_llm, show_log, stderr, stdout

if TYPE_CHECKING:
    from arctic_jax import LLM, RequestOutput, SamplingParams

CHAT_HELP = "/reset forgets the conversation, Ctrl-C stops an answer, /exit or Ctrl-D leaves."

app = typer.Typer(
    help="LLM inference in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The models.", no_args_is_help=True)
app.add_typer(bench.app, name="bench")
app.add_typer(models_app, name="models")
app.add_typer(training.app, name="swiftkv")
app.add_typer(speculator.app, name="speculator")
command(app, "evaluate")(training.evaluate)
command(app, "embed")(embedding.embed)
command(app, "serve")(serve.serve)


def main() -> None:
    """Run the command line."""
    faulthandler.enable()  # a crash in compiled code says where it was
    show_log()
    app()


MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Keep this much of the probability mass.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many tokens; 0 for all.")]
Stop = Annotated[list[str] | None, typer.Option(help="A string that ends the answer; repeatable.")]


@command(app, "generate")
def generate(
    engine: dict[str, Any],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Repeatable.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="One prompt a line; - for standard input.")
    ] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    stop: Stop = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
) -> None:
    """Continue prompts, all of them in one batch."""
    prompts = list(prompt or [])
    if prompts_file is not None:
        lines = sys.stdin if str(prompts_file) == "-" else prompts_file.read_text().splitlines()
        prompts += [line.rstrip("\n") for line in lines if line.strip()]
    if not prompts:
        raise ValueError("nothing to do: give --prompt or --prompts-file")
    given = _given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        seed=engine.get("seed"),
    )
    llm = make_llm(engine)
    params = dataclasses.replace(llm.get_default_sampling_params(), **given)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=len(prompts) > 1)
    seconds = time.perf_counter() - start
    for output in outputs:
        if as_json:
            print(json.dumps(_as_dict(output), ensure_ascii=False))
        else:
            answers = [_visible(answer.text) for answer in output.outputs]
            stdout.print(
                Text(_visible(output.prompt or ""), "bold"), *answers, sep="", markup=False
            )
    tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    stderr.print(f"[dim]{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s[/]")
    errors = [answer.error for output in outputs for answer in output.outputs if answer.error]
    if errors:
        raise ValueError("; ".join(errors))


@command(app, "chat")
def chat(
    engine: dict[str, Any],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    stop: Stop = None,
) -> None:
    """Talk to a model; it remembers the conversation."""
    given = _given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        seed=engine.get("seed"),
    )
    llm = make_llm(engine)
    given["max_tokens"] = max_tokens  # None: as many as fit
    params = dataclasses.replace(llm.get_default_sampling_params(), **given)
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its editing keys and history
    stderr.print(f"[dim]{CHAT_HELP}[/]")
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(first)
            stderr.print("[dim]forgotten[/]")
            continue
        messages.append({"role": "user", "content": line})
        try:
            reply = _reply(llm, messages, params)
        except ValueError as error:  # too long a conversation, say: the engine lives on
            stderr.print(Text(f"error: {error}", "bold red"))
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": reply})


@command(app, "convert")
def convert(
    model: Annotated[str, typer.Argument(help="An alias, a folder, a GGUF file, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    to: Annotated[str, typer.Option(help="The format: orbax.")] = "orbax",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto leaves the weights as they are.")
    ] = "auto",
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Lay the weights out for this many; 8 also serves 1, 2 and 4."),
    ] = None,
) -> None:
    """Write a model as the engine holds it: the fastest to load, each device its own part."""
    if to != "orbax":
        raise ValueError(f"--to must be orbax, got {to!r}")
    import jax

    from arctic_jax.config import LoadConfig
    from arctic_jax.engine import conversion
    from arctic_jax.progress import bars

    jax.config.update("jax_platforms", "cpu")  # of GPUs nothing is needed
    jax.config.update("jax_num_cpu_devices", devices or conversion.USUAL_DEVICES)
    with bars() as report:
        conversion.convert(LoadConfig(model=model, dtype=dtype), out, devices, report)
    stderr.print(Text(f"{out} is ready: arctic-jax generate --model {out}", "dim"))


@command(models_app, "list")
def list_models() -> None:
    """Show the aliases and the architectures."""
    from arctic_jax.loading import hub
    from arctic_jax.models import registry

    aliases = Table("alias", "what it is", title="Models by name")
    for alias, meaning in hub.ALIASES.items():
        aliases.add_row(alias, meaning)
    architectures = Table("architecture", "implemented in", title="Architectures")
    for name, where in (registry.ARCHITECTURES | registry.ENCODERS).items():
        architectures.add_row(name, where)
    stdout.print(aliases, architectures)


@command(app, "env")
def env(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show versions, devices, memory and cache folders: what a bug report needs."""
    from arctic_jax.serving import environment

    sections = {
        "versions": environment.versions(),
        "host": environment.host(),
        "devices": environment.devices(),
        "folders": environment.folders(),
    }
    if as_json:
        print(json.dumps(sections, indent=2))
        return
    table = Table(show_header=False)
    for title, section in sections.items():
        table.add_section()
        for row in section if isinstance(section, list) else [section]:
            for name, value in row.items():
                is_size = name.startswith("bytes") or name.endswith("bytes")
                shown = f"{value / 2**30:.1f} GiB" if is_size else str(value)
                table.add_row(f"[dim]{title}[/]", name.replace("_", " "), shown)
                title = ""
    stdout.print(table)


def _given(**values: Any) -> dict[str, Any]:
    """Return the sampling parameters that were given; the model's own defaults fill the rest.

    Raises:
        InvalidRequestError: one is out of range; better now than after the model is loaded.
    """
    from arctic_jax import SamplingParams

    given = {name: value for name, value in values.items() if value is not None}
    SamplingParams(**given)
    return given


def _as_dict(output: "RequestOutput") -> dict[str, Any]:
    """Return what `--json` prints: the output's own fields."""
    fields = dataclasses.asdict(output)
    for name in ("prompt_logprobs", "metrics"):
        fields.pop(name)
    return fields


def _visible(text: str) -> str:
    """Take the control characters out: a model must not steer the user's terminal."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or ord(c) > 0x9F)


def _lines() -> Iterator[str]:
    """Yield what the user types, until Ctrl-D or Ctrl-C twice in a row."""
    interrupted = False
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if interrupted:
                return
            interrupted = True
            stderr.print("[dim]Ctrl-C again or Ctrl-D leaves[/]")
            continue
        interrupted = False
        if line:
            yield line


def _reply(llm: "LLM", messages: list[dict[str, str]], params: "SamplingParams") -> str:
    """Print an answer as it comes and return it; Ctrl-C ends it early."""
    text = ""
    with _interrupts() as interrupted, contextlib.closing(llm.stream(messages, params)) as stream:
        for output in stream:
            answer = output.outputs[0]
            if answer.error:
                raise ValueError(answer.error)
            print(_visible(answer.text[len(text) :]), end="", flush=True)
            text = answer.text
            if interrupted:
                break
    print()
    return text


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list instead of raising it, so that no step of the engine is cut in two.

    The second one raises.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)


if __name__ == "__main__":
    main()
