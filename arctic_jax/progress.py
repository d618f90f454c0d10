"""Progress bars on standard error. Vocabulary; silent when they are switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import rich.progress
from rich.console import Console


class Progress:
    """Shows the progress of slow steps, or nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    @contextlib.contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Show a bar of `total` steps; the value is a function to call after each step."""
        if not self.enabled:
            yield lambda *_: None
            return
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(description, total=total)
            yield lambda *_: bars.advance(task)
