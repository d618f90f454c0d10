"""The host's side of `SamplerState`: penalties count tokens, biases forbid them. Host only.

Owned by the runner. Only requests whose parameters adjust logits have a row, and a row is sent only
when it changes by more than the tokens that the device counts itself.
"""

from __future__ import annotations

import numpy as np

from arctic_jax.engine.sampler import IN_PROMPT
from arctic_jax.request import Request


class SamplerRows:
    """Knows what each request's row should hold, and whether it does."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._held: dict[Request, tuple[int, int, frozenset[int]]] = {}

    def changed(self, request: Request) -> tuple[np.ndarray, np.ndarray] | None:
        """Return `seen` and `bias` if the device's row is not what the request needs now.

        For requests whose parameters adjust logits; others have no row.
        """
        banned = self._banned(request)
        # After a preemption the row is another, or has been used by another request.
        key = (request.slot, request.num_preemptions, banned)
        if self._held.get(request) == key:
            return None
        self._held[request] = key
        seen = np.zeros(self.vocab_size, np.int32)
        np.add.at(seen, request.output_token_ids, 1)
        seen[request.prompt_token_ids] |= IN_PROMPT
        return seen, self._bias(request, banned)

    def forget(self, request: Request) -> None:
        """Drop an ended request."""
        self._held.pop(request, None)

    def _banned(self, request: Request) -> frozenset[int]:
        """Tokens that must not come next: ends before `min_tokens`, and ends of bad words."""
        params, output = request.params, request.output_token_ids
        banned: set[int] = set()
        if len(output) < params.min_tokens:
            banned |= request.eos_token_ids | set(params.stop_token_ids or ())
        for word in request.bad_words_ids:
            length = len(word) - 1
            if length == 0 or tuple(output[-length:]) == word[:-1]:
                banned.add(word[-1])
        # A tokenizer, or a list of end-of-sequence tokens, may know more ids than the model has.
        return frozenset(token for token in banned if 0 <= token < self.vocab_size)

    def _bias(self, request: Request, banned: frozenset[int]) -> np.ndarray:
        params = request.params
        bias = np.zeros(self.vocab_size, np.float32)
        if params.allowed_token_ids is not None:
            bias[:] = -np.inf
            bias[list(params.allowed_token_ids)] = 0
        for token, value in (params.logit_bias or {}).items():
            bias[token] += value
        bias[list(banned)] = -np.inf
        return bias
