"""What every step was: its layout, tokens, padding and time. Host only, no jax.

Owned by the engine thread; totals may be read from anywhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Attributes:
        replica: which of several equal engines.
        step: counted from 0.
        time: when its results were there, seconds since the epoch.
        ms: from when the device could begin (it was launched, and the one before was done).
        layout: in which it ran.
        num_seqs: requests in it.
        num_tokens: their tokens.
        num_rows: those of them that got logits; SwiftKV's upper layers are only for these.
        num_padded_tokens: tokens that were computed.
    """

    replica: int
    step: int
    time: float
    ms: float
    layout: str
    num_seqs: int
    num_tokens: int
    num_rows: int
    num_padded_tokens: int


@dataclass
class StepTotals:
    """Sums over the steps of one layout."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    rows: int = 0
    padded_tokens: int = 0


class StepLog:
    """Counts steps, and writes them to a file if there is one.

    Args:
        path: gets a line of JSON a step, appended; `None` for no file.
        replica: which of several equal engines this is.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path | None = None, replica: int = 0) -> None:
        self._replica = replica
        self.totals: dict[str, StepTotals] = {}
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.touch()
        self.on_step: Callable[[StepRecord], None] | None = None
        """Told of every step, in the engine's thread."""
        self._count = 0
        self._last_done = 0.0

    def add(
        self,
        launched: float,
        layout: str,
        num_seqs: int,
        num_tokens: int,
        num_rows: int,
        num_padded_tokens: int,
    ) -> None:
        """Count a step whose results have just come; `launched` is a `time.perf_counter()`."""
        done = time.perf_counter()
        seconds = done - max(launched, self._last_done)
        self._last_done = done
        totals = self.totals.setdefault(layout, StepTotals())
        totals.steps += 1
        totals.seconds += seconds
        totals.tokens += num_tokens
        totals.rows += num_rows
        totals.padded_tokens += num_padded_tokens
        record = StepRecord(
            self._replica,
            self._count,
            time.time(),
            round(seconds * 1e3, 3),
            layout,
            num_seqs,
            num_tokens,
            num_rows,
            num_padded_tokens,
        )
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        if self.on_step is not None:
            self.on_step(record)
        self._count += 1


def padding(logs: Iterable[StepLog]) -> float:
    """Share of the computed tokens that were padding."""
    totals = [totals for log in logs for totals in log.totals.values()]
    computed = sum(t.padded_tokens for t in totals)
    return 1 - sum(t.tokens for t in totals) / computed if computed else 0.0
