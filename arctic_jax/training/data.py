"""Text for training: JSON lines to rows of packed sequences. Host only, no jax.

A line is `{"messages": [...]}`, of which the assistant's tokens count, or `{"text": "..."}`, of
which all do; other keys are ignored.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arctic_jax.loading.tokenizer import Tokenizer

OPEN_ROWS = 64
"""Rows that are tried for a sequence before a new one is begun."""

LINES_AT_ONCE = 1024
"""Lines that are encoded together."""


@dataclass(frozen=True)
class Sample:
    """A sequence, and of each token whether it is one that shall be predicted."""

    token_ids: list[int]
    counts: list[bool]


@dataclass(frozen=True)
class Rows:
    """Packed sequences, `[rows, S]` each; the fields of `forward.Batch`."""

    token_ids: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    segment_ids: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.token_ids)

    def fields(self, rows: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Return the fields of some rows."""
        return {name: value[rows] for name, value in vars(self).items()}

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids > 0).sum())


def read_rows(path: Path, tokenizer: Tokenizer, max_length: int) -> Rows:
    """Read, tokenize and pack a file of JSON lines.

    Args:
        path: the file.
        tokenizer: of the model.
        max_length: S; longer sequences are cut off.

    Raises:
        ValueError: a line is of neither form, or nothing in the file can be predicted.
    """
    samples = list(read_samples(path, tokenizer))
    rows = pack(samples, max_length)
    if not rows.counts.any():
        raise ValueError(f"{path} has no token that could be predicted within {max_length}")
    return rows


def read_samples(path: Path, tokenizer: Tokenizer) -> Iterator[Sample]:
    """Yield the sequence of each line; see the module.

    Raises:
        ValueError: a line is of neither form; the message has its number.
    """
    with path.open(encoding="utf-8") as file:
        numbered = ((f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
        for some in itertools.batched(numbered, LINES_AT_ONCE):
            yield from _encode([_read(line, where, tokenizer) for where, line in some], tokenizer)


@dataclass(frozen=True)
class _Piece:
    """Text of a sequence that is encoded by itself, and whether its tokens count."""

    text: str
    counts: bool
    is_whole: bool = False
    """Whether it is all of the sequence, and gets the special tokens of a text."""


def _read(line: str, where: str, tokenizer: Tokenizer) -> list[_Piece]:
    try:
        return _pieces(json.loads(line), tokenizer)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {error!r}") from error


def _pieces(line: Mapping[str, Any], tokenizer: Tokenizer) -> list[_Piece]:
    if "messages" in line:
        return _conversation(line["messages"], tokenizer)
    if isinstance(text := line.get("text"), str):
        text.encode()  # half a surrogate pair, as JSON can hold, is found here
        return [_Piece(text, counts=True, is_whole=True)]
    raise ValueError('neither "messages" nor "text"')


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[_Piece]:
    """Split a conversation, since what the assistant says counts and no more."""
    pieces: list[_Piece] = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for end, asked, counted in ((i, True, False), (i + 1, False, True)):
            text = tokenizer.render_chat_template(messages[:end], add_generation_prompt=asked)
            if not text.startswith(written):
                raise ValueError("the chat template does not only add text as messages are added")
            pieces.append(_Piece(text[len(written) :], counted))
            written = text
    return pieces


def _encode(sequences: Sequence[Sequence[_Piece]], tokenizer: Tokenizer) -> Iterator[Sample]:
    """Encode the pieces of many sequences at once: the tokenizer has threads."""
    ids: dict[_Piece, list[int]] = {}
    for is_whole in (False, True):
        kind = [piece for pieces in sequences for piece in pieces if piece.is_whole == is_whole]
        encoded = tokenizer.encode_batch([p.text for p in kind], add_special_tokens=is_whole)
        ids |= dict(zip(kind, encoded, strict=True))
    for pieces in sequences:
        tokens = [token for piece in pieces for token in ids[piece]]
        counts = [piece.counts for piece in pieces for _ in ids[piece]]
        if any(piece.is_whole for piece in pieces) and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
            counts.append(True)
        yield Sample(tokens, counts)


def pack(samples: Sequence[Sample], length: int) -> Rows:
    """Put sequences into rows of `length` tokens, each into the first row that has room."""
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        sample = Sample(sample.token_ids[:length], sample.counts[:length])
        size = len(sample.token_ids)
        first = max(len(rows) - OPEN_ROWS, 0)
        row = next((r for r in range(first, len(rows)) if room[r] >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(sample)
        room[row] -= size
    ids, positions, segments = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    packed = Rows(ids, positions, segments, np.zeros((len(rows), length), bool))
    for row, members in enumerate(rows):
        start = 0
        for segment, sample in enumerate(members, 1):
            here = slice(start, start + len(sample.token_ids))
            packed.token_ids[row, here] = sample.token_ids
            packed.positions[row, here] = np.arange(len(sample.token_ids))
            packed.segment_ids[row, here] = segment
            # A token's row of logits predicts the one after it.
            packed.counts[row, here] = [*sample.counts[1:], False]
            start = here.stop
    return packed


def batches(num_rows: int, size: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the rows of one batch after the other, endlessly; each epoch in another order."""
    epoch = 0
    left = np.zeros(0, np.int64)
    while True:
        while len(left) < size:
            order = np.random.default_rng((seed, epoch)).permutation(num_rows)
            left = np.concatenate([left, order])
            epoch += 1
        yield left[:size]
        left = left[size:]
