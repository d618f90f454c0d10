"""`arctic-jax speculator`: make one, reduce it, and see how many of its drafts are accepted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from arctic_jax.serving import environment, training
from arctic_jax.serving.options import command, make_llm, stderr, stdout
from arctic_jax.serving.training_progress import training_bars

app = typer.Typer(help="Make speculators.", no_args_is_help=True)
command(app, "generate")(training.generate)


@command(app, "train")
def train(
    model: training.Model,
    data: training.Data,
    out: training.Out,
    kind: Annotated[str, typer.Option(help="lstm or mlp.")] = "lstm",
    inner_size: Annotated[int, typer.Option(min=1, help="Of its states.")] = 1024,
    n_predict: Annotated[int, typer.Option(min=1, help="Tokens of a draft.")] = 3,
    share: Annotated[
        bool, typer.Option("--share/--no-share", help="Use the model's embedding and head.")
    ] = True,
    steps: training.Steps = None,
    epochs: training.Epochs = 1.0,
    batch_size: training.BatchSize = 16,
    max_length: training.MaxLength = 1024,
    learning_rate: training.LearningRate = 1e-3,
    schedule: training.Schedule = "cosine",
    warmup: training.Warmup = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.1,
    dtype: training.Dtype = "bfloat16",
    attention: training.Attention = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and the data's order.")] = 0,
    save_every: training.SaveEvery = 200,
) -> None:
    """Train a speculator for a model, on all devices; see docs/speculative-decoding.md."""
    from arctic_jax.config import LoadConfig
    from arctic_jax.training import speculator

    recipe = speculator.Recipe(
        kind=kind,
        inner_size=inner_size,
        n_predict=n_predict,
        shares=share,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=learning_rate,
        schedule=schedule,  # pyright: ignore[reportArgumentType]  # it checks
        warmup=warmup,
        weight_decay=weight_decay,
        dtype=dtype,
        attention=attention,  # pyright: ignore[reportArgumentType]  # JAX checks
        seed=seed,
        save_every=save_every,
    )

    def figures(line: Mapping[str, float]) -> str:
        accepted = "  ".join(f"{line[f'accepted_{k}']:.1%}" for k in range(1, n_predict + 1))
        return f"loss {line['loss']:.3f}  accepted {accepted}"

    with training_bars("Training", figures) as (report, on_step):
        count = speculator.train(LoadConfig(model=model), data, out, recipe, report, on_step)
    made = out / speculator.SPECULATOR
    config = json.dumps({"method": "arctic", "model": str(made)})
    stderr.print(Text(f"{made} has {count / 1e6:.2f} million parameters", "dim"))
    stderr.print(Text(f"try: arctic-jax generate --speculative-config '{config}'", "dim"))


@command(app, "reduce")
def reduce(
    speculator: Annotated[str, typer.Argument(help="A folder or a hub id.")],
    text: Annotated[list[Path], typer.Argument(help='JSON lines of "messages" or "text".')],
    model: Annotated[str, typer.Option("--model", "-m", help="The model that it is for.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    size: Annotated[int, typer.Option(help="Tokens that are kept.")] = 32768,
) -> None:
    """Let a speculator draft only the most frequent tokens of a text, which is faster."""
    from arctic_jax.config import LoadConfig
    from arctic_jax.progress import bars
    from arctic_jax.training import reduce_speculator

    with bars() as report:
        share = reduce_speculator.reduce(
            speculator, LoadConfig(model=model), text, size, out, report
        )
    stderr.print(Text(f"{out} knows {size} tokens, {share:.2%} of those in the text", "dim"))


@command(app, "evaluate")
def evaluate(
    engine: dict[str, Any],
    speculator: Annotated[str, typer.Argument(help="A folder or a hub id.")],
    prompts: Annotated[list[Path], typer.Argument(help="JSON lines with prompts, a set each.")],
    limit: Annotated[int | None, typer.Option(min=1, help="So many prompts of each.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Let the engine answer greedily with a speculator's drafts, and count those accepted."""
    from arctic_jax.speculative_config import SpeculativeConfig
    from arctic_jax.training import evaluate_speculator

    given = {"method": "arctic", "model": speculator, "adaptive": False}
    if engine["speculative_config"] is not None:
        SpeculativeConfig.from_user(engine["speculative_config"])
        given |= json.loads(engine["speculative_config"])
    llm = make_llm(engine | {"speculative_config": given})
    results = {
        "model": engine["model"],
        "speculator": speculator,
        "speculative_config": given,
        "sets": evaluate_speculator.evaluate(llm, prompts, limit, max_tokens),
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = results | {"environment": environment.record()}
        out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    stdout.print_json(json.dumps(results))
