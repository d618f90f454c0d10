"""Text for training: JSON lines to rows of packed sequences. Host only, no jax.

A line is `{"messages": [...]}`, of which the assistant's tokens count, or `{"text": "..."}`, of
which all do; other keys are ignored.
"""

from __future__ import annotations

import itertools
import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arctic_jax.loading.tokenizer import Tokenizer

OPEN_ROWS = 64
"""Rows that are tried for a sequence before a new one is begun."""

READERS = 4
LINES_AT_ONCE = 32


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
    lines = [
        (f"{path}:{number}", line)
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1)
        if line.strip()
    ]
    # Chat templates are rendered by processes, one a tokenizer: threads wait for several at once.
    tokenizers: queue.SimpleQueue[Tokenizer] = queue.SimpleQueue()
    for _ in range(READERS):
        tokenizers.put(Tokenizer(tokenizer.hf))

    def samples(some: Sequence[tuple[str, str]]) -> list[Sample]:
        own = tokenizers.get()
        try:
            return [_read(line, where, own) for where, line in some]
        finally:
            tokenizers.put(own)

    with ThreadPoolExecutor(READERS) as threads:
        try:
            for some in threads.map(samples, itertools.batched(lines, LINES_AT_ONCE)):
                yield from some
        finally:
            threads.shutdown(cancel_futures=True)


def _read(line: str, where: str, tokenizer: Tokenizer) -> Sample:
    try:
        return _sample(json.loads(line), tokenizer)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {error!r}") from error


def _sample(line: Mapping[str, Any], tokenizer: Tokenizer) -> Sample:
    if "messages" in line:
        return _conversation(line["messages"], tokenizer)
    if isinstance(line.get("text"), str):
        ids = tokenizer.encode(line["text"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        return Sample(ids, [True] * len(ids))
    raise ValueError('neither "messages" nor "text"')


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Sample:
    """Encode a conversation piece by piece, since what the assistant says counts and no more."""
    ids: list[int] = []
    counts: list[bool] = []
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for end, asked, counted in ((i, True, False), (i + 1, False, True)):
            text = tokenizer.render_chat_template(messages[:end], add_generation_prompt=asked)
            if not text.startswith(written):
                raise ValueError("the chat template does not only add text as messages are added")
            piece = tokenizer.encode(text[len(written) :], add_special_tokens=False)
            ids += piece
            counts += [counted] * len(piece)
            written = text
    return Sample(ids, counts)


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
