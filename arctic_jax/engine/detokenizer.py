"""Text from tokens as they come, and the strings that end it. Host only, no jax.

Owned by the engine thread; one `TextStream` an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream

_CONTEXT = range(4, 24)
"""Lengths of the prompt's end that are tried as the beginning of a stream."""


class TextStream:
    """The text of one answer, token by token.

    It continues the prompt: where a tokenizer drops the space before the first word of a text, the
    answer's first word keeps it. Bytes of a character that is not complete yet, and text that may
    turn out to be the beginning of a stop string, are held back from `visible`. Without stop
    strings no text is made before somebody wants it: all at once is much cheaper. What is taken
    with `take` is forgotten here, so that an answer taken bit by bit costs its length once.

    Args:
        tokenizer: decodes.
        prompt_token_ids: what the answer continues.
        stop: strings that end the answer.
        include_stop: whether such a string is part of the text.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = self._end_of(prompt_token_ids)
        self._stream = self._new_stream()
        self._pending: list[int] = []  # taken, not yet decoded
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._longest = max(map(len, self._stop), default=1)
        self._begun = False
        self.text = ""
        """What was made of the tokens and not taken yet."""

    def push(self, token: int, may_stop: bool = True) -> str | None:
        """Take a token; return the stop string that it completes, after cutting the text there."""
        if not self._stop:
            self._pending.append(token)
            return None
        chunk = self._decode(token)
        if not chunk:
            return None
        before = len(self.text)
        self.text += chunk
        if not may_stop:
            return None
        # Only what ends in the new chunk: what was complete before did not stop the answer then.
        found = [
            (at, s)
            for s in self._stop
            if (at := self.text.find(s, max(0, before - len(s) + 1))) >= 0
        ]
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        return stop

    def flush(self) -> None:
        """Make the text of all tokens taken so far."""
        tokens, self._pending = self._pending, []
        if len(tokens) > 1 and not self._begun:
            stream = self._new_stream()
            with contextlib.suppress(Exception):  # what is wrong shows one by one
                self.text = stream.step(self._tokenizer, tokens) or ""
            if self.text:
                self._stream, self._begun = stream, True
                return
        for token in tokens:  # also if the last one leaves a character incomplete
            self.text += self._decode(token) or ""

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(self._context, skip_special_tokens=self._skip_special_tokens)

    def _decode(self, token: int) -> str | None:
        self._begun = True
        try:
            return self._stream.step(self._tokenizer, token)
        except Exception as error:  # the library has no type of its own for it
            if "Invalid prefix" not in str(error):
                raise
            # Bytes that are no UTF-8 changed what earlier ones decode to: go on from here.
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._tokenizer, token)

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """Return the prompt's last tokens, so many that no character is cut; none if it ends so."""
        for length in _CONTEXT:
            end = list(prompt[-length:])
            text = self._tokenizer.decode(end, skip_special_tokens=self._skip_special_tokens)
            if "\N{REPLACEMENT CHARACTER}" not in text:
                return end
            if length >= len(prompt):
                break
        return []

    def take(self, everything: bool) -> str:
        """Hand out what is `visible`, or everything at the end of the answer, and forget it.

        A stop string that is found later never begins in what was visible.
        """
        taken = self.text if everything else self.visible
        self.text = self.text[len(taken) :]
        return taken

    @property
    def visible(self) -> str:
        """The text without an end that may become a stop string."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(len(s) > length and s.startswith(end) for s in self._stop):
                return self.text[:-length]
        return self.text
