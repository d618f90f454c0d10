"""Drafts from the request's own earlier tokens. Host only.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): if the last n tokens
stood somewhere before, what came after them there may come again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from arctic_jax.request import Request
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.host_proposer import HostProposer
from arctic_jax.speculative_config import SpeculativeConfig


@dataclass
class _History:
    """A request's known tokens, and after which n-grams the last of them came where."""

    tokens: list[int] = field(default_factory=list)
    follows: dict[tuple[int, ...], int] = field(default_factory=dict)


class NgramProposer(HostProposer):
    """Looks up the longest n-gram that stood before, where it did last."""

    def __init__(self, config: SpeculativeConfig) -> None:
        super().__init__(config)
        shortest, longest = config.lookup_lengths
        self._lengths = range(longest, shortest - 1, -1)
        self._histories: dict[Request, _History] = {}

    def start(self, request: Request) -> None:
        """See `HostProposer`."""
        self._histories[request] = _History()
        self._extend(self._histories[request], request.prompt_token_ids)

    def observe(self, tokens: Mapping[Request, Sequence[int]]) -> None:
        """See `HostProposer`."""
        for request, new in tokens.items():
            self._extend(self._histories[request], new)

    def drafts(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        """See `HostProposer`."""
        return [
            self._draft(self._histories[r], limit)
            for r, limit in zip(requests, limits, strict=True)
        ]

    def stop(self, request: Request) -> None:
        """See `HostProposer`."""
        del self._histories[request]

    def _extend(self, history: _History, new: Sequence[int]) -> None:
        tokens, begin = history.tokens, len(history.tokens)
        tokens.extend(new)
        for n in self._lengths:
            for i in range(max(begin, n), len(tokens)):
                history.follows[tuple(tokens[i - n : i])] = i

    def _draft(self, history: _History, limit: int) -> Draft:
        for n in self._lengths:
            at = history.follows.get(tuple(history.tokens[-n:]))
            if at is not None:
                found = history.tokens[at : at + limit]
                return Draft(found, [1.0] * len(found))
        return Draft()
