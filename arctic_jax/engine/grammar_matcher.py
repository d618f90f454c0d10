"""`Matcher`: follows one answer along its grammar, and has threads compute what may come next.

A mask takes a tenth of a millisecond, but a grammar of a few hundred characters can make it take
half a second, in which the library lets Python's other threads run. So nobody but its own request
waits for it: it is begun as soon as the tokens before it are known, and the scheduler leaves the
request out until it is done.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # it is loaded when the first grammar comes
    from llguidance import LLExecutor, LLMatcher

DRAFT_TIME = 0.005  # seconds, after which no more of a draft is looked at


def mask_threads() -> ThreadPoolExecutor:
    """Make the threads that compute an engine's masks; each begins when it is needed."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 16), thread_name_prefix="arctic-jax-mask")


class Matcher:
    """A `GrammarMatcher`. Owned by the engine thread, but for the time until its masks are done.

    Args:
        state: llguidance's.
        eos_token_ids: that end an answer.
        num_words: of 32 bits, of a mask.
        threads: that compute masks.
        masks: the first one, if it is known.

    Attributes:
        state: see above.
        num_words: see above.
    """

    def __init__(
        self,
        state: LLMatcher,
        eos_token_ids: frozenset[int],
        num_words: int,
        threads: ThreadPoolExecutor,
        masks: np.ndarray | None = None,
    ) -> None:
        self.state = state
        self.num_words = num_words
        self._eos_token_ids = eos_token_ids
        self._threads = threads
        self._draft: tuple[int, ...] = ()
        self._masks: Future[np.ndarray] | None = None
        if masks is not None:
            self._masks = Future()
            self._masks.set_result(masks)
        self._begun: float | None = None

    def accept(self, token: int) -> bool:
        """See `GrammarMatcher`."""
        self._masks = None
        if token in self._eos_token_ids:
            allowed = complete = self.state.is_accepting()
        else:
            allowed = self.state.consume_token(token)
            complete = self.state.is_stopped()
        if not allowed or self.state.is_error():
            why = self.state.get_error() or self.state.stop_reason()
            raise ValueError(f"the grammar does not allow token {token}: {short(why)}")
        return complete

    def allowed_prefix(self, tokens: Sequence[int]) -> int:
        """See `GrammarMatcher`.

        The library sets no bound to this, and it may take seconds: so the beginning first, and
        twice as many tokens as long as they take little time.
        """
        allowed, size, end = 0, 1, time.monotonic() + DRAFT_TIME
        while allowed < len(tokens) and time.monotonic() < end:
            allowed = self.state.validate_tokens(list(tokens[:size]))
            if allowed < min(size, len(tokens)):
                break
            size *= 2
        return allowed

    def prepare(self, draft: Sequence[int]) -> None:
        """See `GrammarMatcher`."""
        self._draft, self._begun = tuple(draft), None
        self._masks = self._threads.submit(self.compute, self._draft)

    @property
    def ready(self) -> bool:
        """See `GrammarMatcher`."""
        return self._masks is None or self._masks.done()

    @property
    def seconds(self) -> float:
        """See `GrammarMatcher`."""
        return 0.0 if self.ready or self._begun is None else time.monotonic() - self._begun

    def wait(self, seconds: float) -> bool:
        """See `GrammarMatcher`."""
        if self._masks is not None:
            wait([self._masks], seconds)
        return self.ready

    def masks(self, draft: Sequence[int]) -> np.ndarray:
        """Return `[1 + len(draft), num_words]` int32; those after a draft's end keep all bits."""
        if self._masks is None or self._draft[: len(draft)] != tuple(draft):
            self.prepare(draft)
        assert self._masks is not None
        return self._masks.result()[: len(draft) + 1]

    def cancel(self) -> None:
        """See `GrammarMatcher`."""
        if self._masks is not None:
            self._masks.cancel()

    def compute(self, draft: Sequence[int]) -> np.ndarray:
        """Compute what `masks` returns, in the thread that calls."""
        from llguidance import numpy as bits

        self._begun = time.monotonic()
        masks = np.full((len(draft) + 1, self.num_words), -1, np.int32)
        if draft:
            parts = [(self.state, 0, list(draft))]
            bits.fill_next_token_bitmask_par_with_draft_tokens(_executor(), parts, masks)
        else:
            bits.fill_next_token_bitmask(self.state, masks, 0)
        return masks


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar, for any number of requests.

    Attributes:
        start: llguidance's state at the beginning of an answer.
        eos_token_ids: that end an answer.
        first_mask: `[1, num_words]` int32.
        threads: that compute further ones.
    """

    start: LLMatcher
    eos_token_ids: frozenset[int]
    first_mask: np.ndarray
    threads: ThreadPoolExecutor

    def matcher(self) -> Matcher:
        """Return a matcher at the beginning of an answer."""
        return Matcher(
            self.start.deep_copy(),
            self.eos_token_ids,
            self.first_mask.shape[1],
            self.threads,
            self.first_mask,
        )


def short(message: str) -> str:
    """Keep the beginning of one of the library's messages, as one line."""
    return " ".join(message.partition("<state>")[0].split())[:300]


@functools.cache
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor()
