"""How much a client may ask for, and how much may wait. Owned by the event loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from arctic_jax.serving.error_responses import BUSY, APIError


@dataclass(frozen=True)
class Limits:
    """Bounds of one call and of all that wait.

    Attributes:
        max_body_bytes: of a call.
        max_prompts: of a call.
        max_n: answers to a prompt.
        max_stop_strings: of a call.
        max_num_queued_reqs: answers that wait for a place in the engine.
        max_queued_tokens: prompt tokens of calls of which nothing was answered yet.
    """

    max_body_bytes: int = 32 << 20
    max_prompts: int = 1024
    max_n: int = 128
    max_stop_strings: int = 16
    max_num_queued_reqs: int = 4096
    max_queued_tokens: int = 2_000_000

    def check(self, name: str, value: int, most: int) -> None:
        """Refuse what is too much of something.

        Raises:
            APIError: with the name, the number and the limit.
        """
        if value > most:
            raise APIError(400, f"{name} must be at most {most}, got {value}.", name)


class Admission:
    """Knows how many answers are in the server and how many prompt tokens wait.

    Args:
        limits: of what waits.
        slots: answers that the engine works on at once; these do not wait.
        queued_tokens: counts the prompt tokens in the engine's queue.
    """

    def __init__(
        self, limits: Limits, slots: int, queued_tokens: Callable[[], int] = lambda: 0
    ) -> None:
        self._limits = limits
        self._slots = slots
        self._queued_tokens = queued_tokens
        self.num_answers = 0
        self.num_calls = 0
        self.num_waiting_tokens = 0
        self.num_refused = {"queued_requests": 0, "queued_tokens": 0}

    def admit(self, num_answers: int, num_tokens: int) -> Ticket:
        """Let a call in. What is too much on its own is let in when nothing else waits.

        Raises:
            APIError: 503, too much waits already.
        """
        limits = self._limits
        most = self._slots + limits.max_num_queued_reqs
        if self.num_answers and self.num_answers + num_answers > most:
            self._refuse("queued_requests")
        # Of calls that are answered at their end only, the engine alone knows whether they wait.
        waiting = self.num_waiting_tokens
        if waiting and waiting + num_tokens > limits.max_queued_tokens:
            waiting = self._queued_tokens()
            if waiting and waiting + num_tokens > limits.max_queued_tokens:
                self._refuse("queued_tokens")
        return Ticket(self, num_answers, num_tokens)

    def _refuse(self, reason: str) -> None:
        self.num_refused[reason] += 1
        raise APIError(503, BUSY, retry_after=1)


class Ticket:
    """A call that was let in; `close` it when it ends."""

    def __init__(self, admission: Admission, num_answers: int, num_tokens: int) -> None:
        self._admission = admission
        self._num_answers = num_answers
        self._num_tokens = num_tokens
        admission.num_calls += 1
        admission.num_answers += num_answers
        admission.num_waiting_tokens += num_tokens

    def started(self, num_tokens: int) -> None:
        """Say that so many of its tokens do not wait any more."""
        num_tokens = min(num_tokens, self._num_tokens)
        self._num_tokens -= num_tokens
        self._admission.num_waiting_tokens -= num_tokens

    def close(self) -> None:
        """Give its places back; a second time nothing happens."""
        self.started(self._num_tokens)
        if self._num_answers:
            self._admission.num_calls -= 1
            self._admission.num_answers -= self._num_answers
            self._num_answers = 0
