"""Text from tokens as they come, and the strings that end it. Host only, no jax.

Owned by the engine thread; one `TextStream` an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer, token by token.

    Bytes of a character that is not complete yet, and text that may turn out to be the beginning of
    a stop string, are held back from `visible`.

    Args:
        tokenizer: decodes.
        stop: strings that end the answer.
        include_stop: whether such a string is part of the text.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        stop: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._longest = max(map(len, self._stop), default=1)
        self.text = ""

    def push(self, token: int, may_stop: bool = True) -> str | None:
        """Take a token; return the stop string that it completes, after cutting the text there."""
        chunk = self._stream.step(self._tokenizer, token)
        if not chunk:
            return None
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += chunk
        if not may_stop:
            return None
        found = [(at, s) for s in self._stop if (at := self.text.find(s, searched)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        return stop

    @property
    def visible(self) -> str:
        """The text without an end that may become a stop string."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(len(s) > length and s.startswith(end) for s in self._stop):
                return self.text[:-length]
        return self.text
