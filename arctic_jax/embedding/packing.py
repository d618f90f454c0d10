"""Which texts go into which batch. Host only, no jax.

Sequences of a batch fill windows, see `arctic_jax.encoder_batch`. Each window takes the longest
sequence left that fits its room, again and again: long ones first, short ones into the gaps.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from arctic_jax.encoder_batch import EncoderBucket

WINDOWS = (12, 20, 28, 36, 48, 64, 80, 96, 128, 192, 256, 384, 512)
"""The short ones are where a CPU's products step: 36 tokens take less time than 32."""
FEW_WINDOWS = (64, 128, 256, 512)
"""Of these there are batches of 1, 2, 4, ... windows; of others one, and as many as fill one."""
ATTENTION_COST = 1e-3
"""Of a token a key of its window, in units of all else that a token costs."""
NARROWEST_FREE = 64
"""Where attention skips the keys of other sequences a batch is one window: of so many tokens, twice
as many, ..."""
MOST_PADDING = 4096
"""Tokens; more of them at the end of a batch cost a GPU more than a batch by itself."""


@dataclass(frozen=True)
class Plan:
    """A batch to be.

    Attributes:
        bucket: its shape.
        windows: for each window the numbers of the sequences in it.
        lengths: of these sequences by their numbers, in the order of the rows of output.
    """

    bucket: EncoderBucket
    windows: tuple[tuple[int, ...], ...]
    lengths: Mapping[int, int]


def bucket_ladder(
    max_tokens: int, max_length: int, *, skips_other_segments: bool = False
) -> tuple[EncoderBucket, ...]:
    """Return the shapes that are compiled, the cheapest first.

    Args:
        max_tokens: of a batch; but a window is never cut.
        max_length: tokens of the longest sequence.
        skips_other_segments: wide windows cost short sequences nothing, see `segment_attention`.
    """
    if skips_other_segments:
        step = NARROWEST_FREE
        widest = max(max_tokens // step, -(-max_length // step)) * step
        return tuple(EncoderBucket(n, 1) for n in (*_doubling(step, widest - 1), widest))
    windows = [window for window in WINDOWS if window < max_length]
    windows += [*_doubling(1024, max_length - 1), -(-max_length // 16) * 16]
    buckets = set()
    for window in windows:
        full = max(1, max_tokens // window)
        counts = {1, full} if window >= FEW_WINDOWS[0] else {1}
        if window in FEW_WINDOWS or window > WINDOWS[-1]:
            counts |= set(_doubling(1, full))
        buckets |= {EncoderBucket(window, count) for count in counts}
    return tuple(sorted(buckets, key=cost))


def cost(bucket: EncoderBucket) -> float:
    """How long a batch takes, in tokens that attend to nothing."""
    return bucket.num_tokens * (1 + ATTENTION_COST * bucket.window)


class Packer:
    """Collects sequences and hands out batches of them.

    Args:
        ladder: the shapes, from `bucket_ladder`.
    """

    def __init__(self, ladder: Sequence[EncoderBucket]) -> None:
        self._ladder = ladder
        most: dict[int, EncoderBucket] = {}
        for bucket in ladder:
            most[bucket.window] = max(bucket, most.get(bucket.window, bucket))
        self._full = tuple(most.values())
        self._waiting: dict[int, list[int]] = {}  # by length
        self._lengths: list[int] = []  # sorted, each once
        self._num_waiting = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, lengths: Iterable[tuple[int, int]]) -> None:
        """Take in sequences: pairs of number and length."""
        for number, length in lengths:
            if length not in self._waiting:
                self._waiting[length] = []
                insort(self._lengths, length)
            self._waiting[length].append(number)
            self._count(length, 1)

    def remove(self, number: int, length: int) -> None:
        """Take a waiting sequence out again; nothing happens if it does not wait any more."""
        if number in self._waiting.get(length, ()):
            self._waiting[length].remove(number)
            self._count(length, -1)

    def take(self, *, rest: bool, idle: bool = False) -> Plan | None:
        """Return a full batch if there is one.

        Args:
            rest: nothing comes after what waits: else one that is not full.
            idle: the device has nothing to do: else the largest short one that can be filled.

        Raises:
            ValueError: a sequence is longer than the largest window.
        """
        if not self._waiting:
            return None
        bucket = self._best_full_bucket()
        if self._num_tokens >= bucket.num_tokens:
            return self._fill(bucket)
        if rest:
            return self._smallest(bucket)
        short = self._largest_filled() if idle else None
        return self._fill(short) if short else None

    def _best_full_bucket(self) -> EncoderBucket:
        """Return the full batch with the least cost a token, were all as long as the longest."""
        longest = self._lengths[-1]
        fitting = [bucket for bucket in self._full if bucket.window >= longest]
        if not fitting:
            raise ValueError(f"a sequence of {longest} tokens is longer than every window")

        def cost_of_token(bucket: EncoderBucket) -> float:
            return cost(bucket) / (bucket.window // longest * longest * bucket.num_windows)

        # Texts of 16 tokens fill one window of 16 as well as many of 64, but small batches cost
        # more than their tokens.
        largest = max(bucket.num_tokens for bucket in fitting)
        return min((b for b in fitting if 2 * b.num_tokens > largest), key=cost_of_token)

    def _largest_filled(self) -> EncoderBucket | None:
        """Return the largest batch that has no more tokens than what waits."""
        filled = (
            bucket
            for bucket in self._ladder
            if bucket.num_tokens <= self._num_tokens and bucket.window >= self._lengths[-1]
        )
        return max(filled, key=lambda bucket: bucket.num_tokens, default=None)

    def _smallest(self, otherwise: EncoderBucket) -> Plan:
        """Put all that waits into the cheapest batch that holds it, else much of it into one."""
        for bucket in self._ladder:
            if (
                bucket.window >= self._lengths[-1]
                and bucket.num_tokens >= self._num_tokens
                and bucket.max_segments >= self._num_waiting
            ):
                padding = bucket.num_tokens - self._num_tokens
                if padding > MOST_PADDING and (filled := self._largest_filled()):
                    return self._fill(filled)
                plan = self._fill(bucket)
                if not self._waiting:
                    return plan
                self.add(plan.lengths.items())
        return self._fill(otherwise)

    def _fill(self, bucket: EncoderBucket) -> Plan:
        windows, lengths = [], {}
        for _ in range(bucket.num_windows):
            room, window = bucket.window, []
            while len(lengths) < bucket.max_segments and (length := self._longest(room)):
                number = self._waiting[length].pop()
                self._count(length, -1)
                lengths[number] = length
                window.append(number)
                room -= length
            windows.append(tuple(window))
        return Plan(bucket, tuple(windows), lengths)

    def _longest(self, room: int) -> int:
        """Return the greatest length that fits; 0 if none does."""
        index = bisect_right(self._lengths, room)
        return self._lengths[index - 1] if index else 0

    def _count(self, length: int, change: int) -> None:
        """Keep the totals, and the lengths that there are, after a sequence came or went."""
        self._num_waiting += change
        self._num_tokens += change * length
        if not self._waiting[length]:
            del self._waiting[length]
            self._lengths.remove(length)


def _doubling(start: int, end: int) -> list[int]:
    """Return `start`, twice that, ... up to `end`."""
    values = []
    while start <= end:
        values.append(start)
        start *= 2
    return values
