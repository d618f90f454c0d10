"""Counts the tokens of a call."""

from __future__ import annotations

from arctic_jax.request import RequestOutput
from arctic_jax.serving.protocol import PromptTokensDetails, Usage


class UsageCounter:
    """The tokens of all requests of a call, as far as they are known.

    Args:
        details: whether to say how many tokens of the prompts were cached.
    """

    def __init__(self, details: bool) -> None:
        self._details = details
        self._counts: dict[int, tuple[int, int, int]] = {}

    def take(self, index: int, output: RequestOutput, generates: bool = True) -> None:
        """Take the newest state of a request."""
        completion = sum(len(answer.token_ids) for answer in output.outputs) if generates else 0
        self._counts[index] = (
            len(output.prompt_token_ids),
            completion,
            output.num_cached_tokens,
        )

    @property
    def total(self) -> Usage:
        """Sums over the requests."""
        prompt, completion, cached = map(sum, zip(*self._counts.values(), strict=True))
        details = PromptTokensDetails(cached_tokens=cached) if self._details else None
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=details,
        )
