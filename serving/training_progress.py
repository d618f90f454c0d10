"""A progress bar with the figures of the last step. For commands that train."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from arctic_jax.serving.options import stderr

Report = Callable[[str, int, int], None]
OnStep = Callable[[Mapping[str, float]], None]


@contextmanager
def training_bars(
    title: str, figures: Callable[[Mapping[str, float]], str]
) -> Iterator[tuple[Report, OnStep]]:
    """Yield what a training run reports to: its stages, and what was logged of each step.

    Args:
        title: of the stage that trains.
        figures: what is shown of a step, beside its speed.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    shown = TextColumn("{task.fields[figures]}")
    columns = (TextColumn("{task.description}"), BarColumn(), shown, TimeRemainingColumn())
    with Progress(*columns, console=stderr) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, figures="")
            progress.update(tasks[stage], completed=done, total=total)

        def on_step(line: Mapping[str, float]) -> None:
            if title not in tasks:
                tasks[title] = progress.add_task(title, total=None, figures="")
            text = f"{figures(line)}  {line['tokens_per_s']:,.0f} tokens/s"
            progress.update(tasks[title], figures=text)

        yield report, on_step
