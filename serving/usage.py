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
        self._prompts: dict[int, tuple[int, int]] = {}
        self._num_generated = 0

    def take(self, index: int, output: RequestOutput, generates: bool = True) -> None:
        """Take what is new of a request."""
        if generates:
            self._num_generated += sum(len(answer.token_ids) for answer in output.outputs)
        self._prompts[index] = len(output.prompt_token_ids), output.num_cached_tokens

    @property
    def total(self) -> Usage:
        """Sums over the requests."""
        prompt, cached = map(sum, zip(*self._prompts.values(), strict=True))
        details = PromptTokensDetails(cached_tokens=cached) if self._details else None
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self._num_generated,
            total_tokens=prompt + self._num_generated,
            prompt_tokens_details=details,
        )
