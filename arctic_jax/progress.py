"""How long work (download, conversion, loading, compiling) reports how far it is. Vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""`report(stage, done, total)`; a stage begins with its first call and ends at `done == total`."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def counted(report: Report, stage: str, total: int) -> Callable[[], None]:
    """Give a function that reports one more of `total` done each time it is called."""
    done = itertools.count(1)
    return lambda: report(stage, next(done), total)


def passing[T](items: Iterable[T], advance: Callable[[], None]) -> Iterator[T]:
    """Pass items on, and call `advance` for each."""
    for item in items:
        advance()
        yield item


@contextmanager
def bars(enabled: bool = True, console: Console | None = None) -> Iterator[Report]:
    """Give a `Report` that draws one bar for each stage, on standard error; or `silent`."""
    if not enabled:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    console = console or Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report
