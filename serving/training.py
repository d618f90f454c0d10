"""`arctic-jax swiftkv` and `arctic-jax evaluate`: make a SwiftKV model, and see how good it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from arctic_jax.serving.options import command, make_llm, stderr, stdout
from arctic_jax.serving.training_progress import training_bars

app = typer.Typer(help="Make SwiftKV models.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="An alias, a folder, a GGUF file, or a hub id.")]
Lower = Annotated[
    int, typer.Option("--num-key-value-layers", min=1, help="Layers that run on every token.")
]
Group = Annotated[
    int,
    typer.Option("--key-value-group-size", min=1, help="Upper layers that share keys and values."),
]

# What every training takes; `speculator train` has other defaults.
Data = Annotated[Path, typer.Argument(help='JSON lines of "messages" or "text".')]
Out = Annotated[Path, typer.Argument(help="A folder; what was begun there goes on.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Instead of epochs.")]
Epochs = Annotated[float, typer.Option(help="Over the data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows of a step, all devices.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of a row.")]
LearningRate = Annotated[float, typer.Option(help="The highest.")]
Schedule = Annotated[str, typer.Option(help="After the warm-up: cosine, constant.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps.")]
Dtype = Annotated[str, typer.Option(help="Of the computation; masters are float32.")]
Attention = Annotated[
    str | None, typer.Option(help="xla or cudnn; by default the faster one that can run.")
]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]


@command(app, "convert")
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    lower: Lower,
    group: Group = 1,
    parameters: Annotated[
        Path | None, typer.Option(help="Trained ones, as distill writes: swiftkv.safetensors.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto leaves the weights as they are.")
    ] = "auto",
) -> None:
    """Write a model in its SwiftKV form; without trained parameters it wants distillation."""
    from arctic_jax.config import LoadConfig
    from arctic_jax.progress import bars
    from arctic_jax.training import swiftkv_checkpoint

    load = LoadConfig(model=model, dtype=dtype)
    with bars() as report:
        swiftkv_checkpoint.convert(load, out, lower, group, parameters, report)
    stderr.print(Text(f"{out} is ready: arctic-jax generate --model {out}", "dim"))


@command(app, "generate")
def generate(
    engine: dict[str, Any],
    out: Annotated[Path, typer.Option(help="File for the conversations with their answers.")],
    prompts: Annotated[
        list[Path] | None, typer.Argument(help="JSON lines with prompts.", show_default=False)
    ] = None,
    own_prompts: Annotated[
        int, typer.Option(min=0, help="So many prompts, at most, that the model writes itself.")
    ] = 0,
    held_back: Annotated[
        Path | None, typer.Option(help="File for those that are kept for evaluation.")
    ] = None,
    held_back_every: Annotated[int, typer.Option(min=2, help="One in so many of them.")] = 50,
    limit: Annotated[int | None, typer.Option(min=1, help="So many prompts.")] = None,
    answers: Annotated[int, typer.Option(min=1, help="To each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 0.7,
) -> None:
    """Let a model write the text that its student, or a speculator, is trained on."""
    from arctic_jax import SamplingParams
    from arctic_jax.training import generate as generation

    conversations = list(generation.read_prompts(prompts or []))[:limit]
    if not (conversations or own_prompts):
        raise typer.BadParameter("there are no prompts: give files, or --own-prompts")
    seed = engine.get("seed", 0)
    params = SamplingParams(
        n=answers,
        temperature=temperature,
        top_p=0.95,
        max_tokens=max_tokens,
        seed=seed,
    )
    llm = make_llm(engine)
    if own_prompts:
        conversations += generation.invent_prompts(llm, own_prompts, seed)
    lines, tokens = generation.generate(llm, conversations, params, out, held_back, held_back_every)
    stderr.print(f"[dim]{lines} conversations with {tokens} generated tokens[/]")


@command(app, "distill")
def distill(
    model: Model,
    data: Data,
    out: Out,
    lower: Lower,
    group: Group = 1,
    steps: Steps = None,
    epochs: Epochs = 1.0,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 2048,
    learning_rate: LearningRate = 2e-4,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0.05,
    temperature: Annotated[float, typer.Option(help="Of the divergence.")] = 2.0,
    hidden_weight: Annotated[float, typer.Option(help="Of the hidden states' error.")] = 1.0,
    dtype: Dtype = "bfloat16",
    attention: Attention = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    save_every: SaveEvery = 100,
) -> None:
    """Train a SwiftKV student of a model, on all devices; see docs/swiftkv.md."""
    from arctic_jax.config import LoadConfig
    from arctic_jax.training.distill import Recipe
    from arctic_jax.training.distill import distill as run

    recipe = Recipe(
        lower,
        group,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=learning_rate,
        schedule=schedule,  # pyright: ignore[reportArgumentType]  # it checks
        warmup=warmup,
        temperature=temperature,
        hidden_weight=hidden_weight,
        dtype=dtype,
        attention=attention,  # pyright: ignore[reportArgumentType]  # JAX checks
        seed=seed,
        save_every=save_every,
    )
    with training_bars("Distilling", _figures) as (report, on_step):
        run(LoadConfig(model=model), data, out, recipe, report, on_step)
    stderr.print(Text(f"{out}/model is ready: arctic-jax generate --model {out}/model", "dim"))


def _figures(line: Mapping[str, float]) -> str:
    return f"loss {line['loss']:.4f}  agreement {line['agreement']:.1%}"


def evaluate(
    engine: dict[str, Any],
    teacher: Annotated[str | None, typer.Option(help="The model to compare with.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help='Text to compare on: JSON lines of "messages" or "text".'),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row of it.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    gsm8k: Annotated[
        Path | None, typer.Option(help="Problems: JSON lines of question and answer.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many problems.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 400,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Compare a model with its teacher on text, or let the engine solve GSM8K, or both."""
    from arctic_jax.config import LoadConfig
    from arctic_jax.progress import bars
    from arctic_jax.training import evaluate as evaluation

    if bool(data) != bool(teacher) or not (data or gsm8k):
        raise ValueError("nothing to do: give --teacher and --data, or --gsm8k, or all three")
    results: dict[str, Any] = {"model": engine["model"]}
    if data and teacher:
        load = LoadConfig(model=engine["model"], dtype=engine["dtype"])
        other = LoadConfig(model=teacher, dtype=engine["dtype"])
        with bars() as report:
            found = evaluation.compare_on_text(load, other, data, max_length, batch_size, report)
        results |= {"teacher": teacher, "text": found}
    if gsm8k is not None:
        results["gsm8k"] = evaluation.gsm8k(make_llm(engine), gsm8k, limit, max_tokens)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    stdout.print_json(json.dumps(results))
