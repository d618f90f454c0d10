"""What a draft costs, measured while the engine runs. Host only.

A request with a draft waits until its last tokens are known, and its step has more rows, for which
the others wait, too. How much that is depends on the model, the GPU and how many requests there
are, so it is measured: how many tokens fewer than without drafts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

PRIOR = 1.0
"""Tokens that a portion is taken to cost before any was measured: a step of its request's."""
_PRIOR_OF_STEP = 0.25  # of what a step with drafts takes longer, in steps
_WEIGHT = 2.0  # of that, in portions or steps
_ENOUGH_PORTIONS = 8.0
_OLD = 0.97  # weight of what was measured before, at each portion
_FADING = 0.999  # ... and at each step without drafts
_LEAST, _MOST = 0.05, 8.0
_ENOUGH_STEPS, _ENOUGH_MIXED = 2, 16
_NEW, _OUTLIER = 0.1, 3.0  # of the mean time of a step


@dataclass
class _Costs:
    """With about so many requests.

    Attributes:
        plain: seconds of a step without drafts, of late.
        num_plain: of those; while there are none, steps with prompts must do.
        num_mixed: steps with prompts.
        portions: portions of tokens that their requests waited for.
        missed: tokens of steps that those sat out.
        delay: tokens that all requests could have had in the time that steps took longer.
        num_drafting: steps with drafts ...
        longer: ... and how many steps without would have fitted into what they took longer.
    """

    plain: float = 0.0
    num_plain: int = 0
    num_mixed: int = 0
    portions: float = 0.0
    missed: float = 0.0
    delay: float = 0.0
    num_drafting: float = 0.0
    longer: float = 0.0

    def took(self, seconds: float, mixed: bool) -> None:
        """Learn what a step without drafts took; one stall does not change it much."""
        if mixed:
            self.num_mixed += 1
            if not self.num_plain:
                self.plain += (seconds - self.plain) / self.num_mixed
            return
        self.num_plain += 1
        if self.num_plain > _ENOUGH_STEPS:
            seconds = min(seconds, _OUTLIER * self.plain)
        self.plain += max(_NEW, 1 / self.num_plain) * (seconds - self.plain)
        self._forget(_FADING)
        self.num_drafting *= _FADING
        self.longer *= _FADING

    def waited(self, portions: int) -> None:
        self._forget(_OLD**portions)
        self.portions += portions

    @property
    def is_known(self) -> bool:
        return self.num_plain >= _ENOUGH_STEPS or self.num_mixed >= _ENOUGH_MIXED

    @property
    def of_portion(self) -> float:
        lost = max(self.missed, 0.0) + max(self.delay, 0.0)
        return min(max((_WEIGHT * PRIOR + lost) / (_WEIGHT + self.portions), _LEAST), _MOST)

    def drafted(self, steps: float, num_rounds: int) -> None:
        rest = _OLD**num_rounds
        self.num_drafting = rest * self.num_drafting + num_rounds
        self.longer = rest * self.longer + num_rounds * (steps - 1)

    @property
    def of_step(self) -> float:
        return max(_WEIGHT * _PRIOR_OF_STEP + self.longer, 0.0) / (_WEIGHT + self.num_drafting)

    def _forget(self, rest: float) -> None:
        self.portions *= rest
        self.missed *= rest
        self.delay *= rest


class DraftCosts:
    """Counts the tokens that are lost around drafts, by the number of requests (to a power of two).

    A request that begins to draft leaves the steps that are launched ahead, and comes back to them
    later. So it waits for the results of each draft, and once more when it comes back: that is a
    portion each.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._last: float | None = None
        self._around_drafts = False
        self._of: dict[int, _Costs] = {}

    def took(
        self,
        num_requests: int,
        num_sampled: int,
        num_drafts: int,
        mixed: bool,
        drafts: bool = False,
        num_rounds: int = 1,
    ) -> float:
        """Learn that a step's results have come; return how many steps without drafts it took.

        Of a step of several rounds, how many each took: all here is counted in rounds.

        Args:
            num_requests: that run.
            num_sampled: those of them that got tokens from the step.
            num_drafts: that it verified.
            mixed: whether it computed prompts, too: its time tells nothing about drafts.
            drafts: whether it drafted for the next one.
            num_rounds: that it had.
        """
        now, last, costs = self.clock(), self._last, self._costs(num_requests)
        around_drafts = self._around_drafts or num_drafts > 0
        self._last, self._around_drafts = now, num_drafts > 0
        if last is None:
            return 1.0
        seconds = (now - last) / num_rounds
        if not (around_drafts or (drafts and not mixed)):
            costs.took(seconds, mixed)
        if not costs.plain:
            return 1.0
        steps = 1.0 if mixed else min(seconds / costs.plain, _MOST)
        if around_drafts:
            costs.waited(num_drafts * num_rounds)
            if num_drafts and not mixed:
                costs.drafted(steps, num_rounds)
            costs.missed += num_requests - num_sampled
            costs.delay += num_requests * (steps - 1) * num_rounds
        return steps

    def made(self, num_requests: int, num_drafts: int, num_begun: int) -> None:
        """Learn how many drafts were made; `num_begun` by requests that were launched ahead."""
        if num_drafts:
            self._around_drafts = True
            self._costs(num_requests).waited(num_begun)

    def pause(self) -> None:
        """Learn that no request runs: the time until the next step is not that step's."""
        self._last, self._around_drafts = None, False

    def of_portion(self, num_requests: int) -> float:
        """Return how many tokens are lost where a request waits for its tokens."""
        return self._costs(num_requests).of_portion

    def of_step(self, num_requests: int) -> float:
        """Return how many steps longer one with drafts takes, where nobody waits for it."""
        return self._costs(num_requests).of_step

    def known(self, num_requests: int) -> bool:
        """Whether that was measured often enough, of late."""
        return self._costs(num_requests).portions >= _ENOUGH_PORTIONS

    def plain(self, num_requests: int) -> float:
        """Return the seconds of a step without drafts; 0 if that is not known."""
        costs = self._costs(num_requests)
        return costs.plain if costs.is_known else 0.0

    def _costs(self, num_requests: int) -> _Costs:
        return self._of.setdefault(num_requests.bit_length(), _Costs())
