"""An encoder's work: sequences packed into windows. `EncoderBatch` on the device, and its shape.

Vocabulary. Sequences lie flat, one after another, without padding between them. The flat batch is
cut into windows of equal length and no sequence crosses from one into the next, so that attention
needs to look at one window at a time. As for decoders, all that a program needs comes to the device
in one int32 array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MIN_TOKENS_PER_SEGMENT = 8
"""So many tokens of a batch have one row of output. Shorter texts fill a batch less."""


@dataclass(frozen=True, order=True)
class EncoderBucket:
    """The static shape of a batch. Only these shapes are compiled.

    Attributes:
        window: tokens of a window, and of the longest sequence.
        num_windows: how many there are.
    """

    window: int
    num_windows: int

    @property
    def num_tokens(self) -> int:
        """T, tokens of the batch, padding included."""
        return self.window * self.num_windows

    @property
    def max_segments(self) -> int:
        """S, rows of output."""
        return max(self.num_windows, self.num_tokens // MIN_TOKENS_PER_SEGMENT)

    @property
    def packed_size(self) -> int:
        """Elements of the packed array."""
        return 3 * self.num_tokens + 2 * self.max_segments


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderBatch:
    """What an encoder reads.

    Attributes:
        token_ids: `[T]`.
        positions: `[T]`, from 0 in every segment; 0 for padding.
        segment_ids: `[T]`, the row of output that a token belongs to; S for padding.
        first_rows: `[S]`, where each segment begins; 0 for rows that are not used.
        lengths: `[S]`, tokens of each segment; 1 for rows that are not used.
    """

    token_ids: Array
    positions: Array
    segment_ids: Array
    first_rows: Array
    lengths: Array

    @property
    def bounds(self) -> Array:
        """`[2, T]`, where each token's segment begins and ends; padding is a token by itself."""
        starts = jnp.arange(len(self.positions), dtype=jnp.int32) - self.positions
        lengths = self.lengths.at[self.segment_ids].get(mode="fill", fill_value=1)
        # Once: on a CPU XLA would compute it anew for each score of each layer.
        return jax.lax.optimization_barrier(jnp.stack([starts, starts + lengths]))


def unpack(packed: Array, bucket: EncoderBucket) -> EncoderBatch:
    """Cut the packed array `[bucket.packed_size]` into its parts."""
    tokens, segments = bucket.num_tokens, bucket.max_segments
    token_parts = packed[: 3 * tokens].reshape(3, tokens)
    segment_parts = packed[3 * tokens :].reshape(2, segments)
    return EncoderBatch(*token_parts, *segment_parts)


def pack(windows: Sequence[Sequence[Sequence[int]]], bucket: EncoderBucket) -> np.ndarray:
    """Pack token ids, window by window and sequence by sequence, into one int32 array.

    Raises:
        ValueError: they are more than the bucket holds; the numbers are in the message.
    """
    sequences = list(chain.from_iterable(windows))
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    counts = np.fromiter(map(len, windows), np.int32, len(windows))
    window_of = np.repeat(np.arange(len(windows), dtype=np.int32), counts)
    filled = np.bincount(window_of, lengths, len(windows)).astype(np.int32)
    if (
        len(windows) > bucket.num_windows
        or len(sequences) > bucket.max_segments
        or filled.max(initial=0) > bucket.window
    ):
        raise ValueError(
            f"{len(sequences)} sequences in windows of {filled.tolist()} do not fit {bucket}"
        )
    flat_starts = np.cumsum(lengths, dtype=np.int32) - lengths
    window_starts = np.cumsum(filled, dtype=np.int32) - filled
    starts = flat_starts - window_starts[window_of] + window_of * bucket.window
    positions = np.arange(lengths.sum(), dtype=np.int32) - np.repeat(flat_starts, lengths)
    where = np.repeat(starts, lengths) + positions

    packed = np.zeros(bucket.packed_size, np.int32)
    tokens = packed[: 3 * bucket.num_tokens].reshape(3, -1)
    rows = packed[3 * bucket.num_tokens :].reshape(2, -1)
    tokens[0, where] = np.fromiter(chain.from_iterable(sequences), np.int32, len(where))
    tokens[1, where] = positions
    tokens[2] = bucket.max_segments
    tokens[2, where] = np.repeat(np.arange(len(sequences), dtype=np.int32), lengths)
    rows[0, : len(sequences)] = starts
    rows[1] = 1
    rows[1, : len(sequences)] = lengths
    return packed
