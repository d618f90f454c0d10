"""Which tokens the grammars of a step's requests allow, as bits for the device. Host only, no jax.

A row that draws has a mask of its own: of the known tokens, or of these and the drafted ones before
it. They are computed between two steps of their requests, by threads (`Matcher`).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator

import numpy as np

from arctic_jax.engine.grammar_matcher import Matcher
from arctic_jax.engine.sampler import MASKS_A_CALL
from arctic_jax.request import Request
from arctic_jax.scheduled_batch import ScheduledBatch
from arctic_jax.structured_outputs import StructuredOutputsConfig

PATIENCE = 0.01
"""Seconds that a step waits for the masks of a request before it leaves it out."""


class GrammarMasks:
    """Puts masks together, for the runner."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def fill(self, scheduled: ScheduledBatch) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Give each part that draws by a grammar its `first_mask`; yield the masks in groups.

        Yields:
            What `sampler.set_masks` takes: the first mask's number, `masks`, and `rows`.
        """
        found = [
            (part, part.request.matcher)
            for part in scheduled.requests
            if isinstance(part.request.matcher, Matcher) and part.num_draws
        ]
        if not found:
            return
        num_masks = sum(part.num_draws for part, _ in found)
        num_masks += -num_masks % MASKS_A_CALL
        masks = np.full((num_masks, -(-self.vocab_size // 32)), -1, np.int32)
        rows = np.zeros(num_masks, np.int32)
        first = 0
        for part, matcher in found:
            part.first_mask, end = first, first + part.num_draws
            rows[first:end] = part.request.slot
            drafted = part.request.token_ids[part.end - part.num_drafted : part.end]
            masks[first:end] = matcher.masks(drafted)[:, : masks.shape[1]]
            first = end
        for first in range(0, num_masks, MASKS_A_CALL):
            group = slice(first, first + MASKS_A_CALL)
            yield first, masks[group], rows[group]


class PendingMasks:
    """Requests whose masks are being computed. Owned by the engine thread.

    Args:
        config: how long it may take.
    """

    def __init__(self, config: StructuredOutputsConfig) -> None:
        self._config = config
        self._new: list[Request] = []
        self._slow: list[Request] = []
        self._known_slow: weakref.WeakSet[Request] = weakref.WeakSet()

    def begin(self, request: Request) -> None:
        """Have the next masks of a request computed, its last token being known."""
        if request.matcher is not None:
            request.matcher.prepare(request.draft)
            (self._slow if request in self._known_slow else self._new).append(request)

    def wait(self) -> None:
        """Wait a little: hardly any mask takes longer. Who was too slow once is not waited for."""
        end = time.monotonic() + PATIENCE
        for request in self._new:
            matcher = request.matcher
            if matcher is not None and not matcher.wait(max(end - time.monotonic(), 0.0)):
                self._known_slow.add(request)
                self._slow.append(request)
        self._new = []
        self._slow = [request for request in self._slow if request.waits_for_masks]

    def wait_idly(self) -> None:
        """Wait for the same time, there being nothing else to do."""
        if self._slow and (matcher := self._slow[0].matcher) is not None:
            matcher.wait(PATIENCE)

    def late(self) -> list[Request]:
        """Return requests whose masks take too long, each with its `error`."""
        limit = self._config.mask_time_limit
        late = []
        for request in self._slow:
            if request.matcher is not None and request.matcher.seconds > limit:
                request.error = f"the grammar takes more than {limit:g} seconds for a token"
                late.append(request)
        return late
