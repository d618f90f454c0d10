"""What became of an engine's requests so far, also of those that nobody waited for. No jax.

Owned by the engine thread; may be read from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arctic_jax.request import Request, RequestStatus


@dataclass
class RequestTotals:
    """Sums over requests.

    Attributes:
        prompt_tokens: of prompts that were computed to their end; once for all answers to one.
        cached_tokens: those of them that were found in the cache.
        generated_tokens: of all answers.
        preemptions: times that an answer gave up its blocks and started over; known at its end.
        ends: answers that have ended, by finish reason.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    ends: dict[str, int] = field(
        default_factory=lambda: {status.value: 0 for status in RequestStatus if status.finished}
    )

    def begin(self, request: Request) -> None:
        """Count the prompt of an answer whose first token has come."""
        if request.index == 0:
            self.prompt_tokens += request.num_prompt_tokens
            self.cached_tokens += request.num_cached_tokens

    def end(self, request: Request) -> None:
        """Count an answer that has ended."""
        self.ends[request.status.value] += 1
        self.preemptions += request.num_preemptions
