"""Texts to token ids, many at once. Host only; any thread may call.

The work is done by the threads of `tokenizers`, which need no interpreter.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import numpy as np
import tokenizers

from arctic_jax.errors import InvalidRequestError
from arctic_jax.loading.tokenizer import bound_cache

Text = str | Sequence[int]
"""A text, or its token ids with all special tokens."""
Encoded = Sequence[int] | InvalidRequestError
"""Token ids, or why there are none."""


class TextEncoder:
    """Tokenizes for one model.

    Args:
        tokenizer: of the model. What its file says about padding and truncation is ignored.
        max_length: tokens of the longest text, special ones included.
        vocab_size: rows of the model's embedding.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_length: int, vocab_size: int) -> None:
        self.max_length = max_length
        self._vocab_size = vocab_size
        self._whole = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._whole.no_padding()
        self._whole.no_truncation()
        self._truncating = tokenizers.Tokenizer.from_str(self._whole.to_str())
        self._truncating.enable_truncation(max_length)
        for copy in (self._whole, self._truncating):
            bound_cache(copy)

    def encode(
        self, texts: Sequence[Text], prompt: str = "", *, truncate: bool = True
    ) -> list[Encoded]:
        """Return token ids for each text, or what is wrong with it.

        Args:
            texts: in any number.
            prompt: put before each text.
            truncate: cut texts at `max_length`; else they are errors.
        """
        if not all(isinstance(text, str) for text in texts):
            return [self._encode_one(text, prompt, truncate) for text in texts]
        tokenizer = self._truncating if truncate else self._whole
        prompted = [f"{prompt}{text}" for text in texts]
        try:
            found = [encoding.ids for encoding in tokenizer.encode_batch_fast(prompted)]
        except TypeError:  # half a surrogate pair in one of them
            return [self._encode_one(text, prompt, truncate) for text in texts]
        return [self._checked(ids) for ids in found]

    def _encode_one(self, text: Text, prompt: str, truncate: bool) -> Encoded:
        if isinstance(text, str):
            tokenizer = self._truncating if truncate else self._whole
            try:
                return self._checked(tokenizer.encode(prompt + text).ids)
            except TypeError as error:  # half a surrogate pair
                message = f"the text {text!r:.100} cannot be encoded: {error}"
                return InvalidRequestError(message, "input")
        if isinstance(text, Sequence | np.ndarray) and len(text):
            if all(isinstance(i, numbers.Integral) and 0 <= i < self._vocab_size for i in text):
                ids = [int(i) for i in text]
                return ids[: self.max_length] if truncate else self._checked(ids)
            reason = f"not all of {text!r:.100} are token ids below {self._vocab_size}"
            return InvalidRequestError(reason, "input")
        return InvalidRequestError(f"an input is text or token ids, got {text!r:.100}", "input")

    def _checked(self, ids: list[int]) -> Encoded:
        if not ids:  # of an empty text, where the tokenizer adds no special tokens
            return InvalidRequestError("the text has no tokens", "input")
        if len(ids) <= self.max_length:
            return ids
        return InvalidRequestError(
            f"the text has {len(ids)} tokens, the model takes {self.max_length}", "input"
        )
