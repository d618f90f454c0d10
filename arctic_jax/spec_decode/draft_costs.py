"""What a draft costs, measured while the engine runs. Host only.

A request with a draft waits until its last tokens are known, and its step has more rows: its tokens
come in larger portions, but less often. How much less depends on the model, the GPU and how many
requests there are, so it is measured: seconds from one portion of a request to its next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arctic_jax.request import Request

if TYPE_CHECKING:  # it imports jax, which this package does without
    from arctic_jax.batch import ScheduledRequest

MIN_GAIN = 0.5
"""Accepted tokens that pay for a draft's step, until it is known."""
ENOUGH = 16
"""Steps of a kind after which its time counts as known."""
_LEAST, _MOST = 0.05, 8.0
_NEW, _OUTLIER = 0.1, 3.0


@dataclass
class _Mean:
    """Of late; one stall among many steps does not change it much."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        if self.count > ENOUGH:
            value = min(value, _OUTLIER * self.value)
        self.value += max(_NEW, 1 / self.count) * (value - self.value)

    @property
    def known(self) -> bool:
        return self.count >= ENOUGH


class DraftCosts:
    """Compares steps with and without drafts, by the number of requests (to a power of two).

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: dict[Request, float] = {}  # when its last portion came
        self._means: dict[tuple[int, bool], _Mean] = {}  # by size, and whether there were drafts

    def took(self, parts: Iterable[ScheduledRequest]) -> None:
        """Learn that a step's results have come.

        Of a step with drafts only those that drafted count: beside them others wait longer, too.
        """
        now = self._clock()
        parts = [part for part in parts if part.samples]
        drafted = any(part.num_drafted for part in parts)
        seconds = [
            now - self._last[part.request]
            for part in parts
            if part.request in self._last and (part.num_drafted > 0) == drafted
        ]
        self._last.update((part.request, now) for part in parts)
        if seconds:
            self._mean(len(parts), drafted).add(sum(seconds) / len(seconds))

    def min_gain(self, num_requests: int) -> float:
        """Return how many tokens a draft must have accepted to be no loss."""
        plain, drafted = (self._mean(num_requests, kind) for kind in (False, True))
        if not (plain.known and drafted.known and plain.value > 0):
            return MIN_GAIN
        return min(max(drafted.value / plain.value - 1, _LEAST), _MOST)

    def must_be_measured(self, num_requests: int) -> bool:
        """Whether steps without drafts are due: only those with drafts are known."""
        plain, drafted = (self._mean(num_requests, kind) for kind in (False, True))
        return drafted.known and not plain.known

    def forget(self, request: Request) -> None:
        """Drop what is remembered of a request, if anything."""
        self._last.pop(request, None)

    def _mean(self, num_requests: int, drafted: bool) -> _Mean:
        return self._means.setdefault((num_requests.bit_length(), drafted), _Mean())
