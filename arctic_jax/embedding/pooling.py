"""From the hidden states of a text's tokens to one vector. Pure; inside the encoder program."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from arctic_jax.encoder_batch import EncoderBatch

Pooling = Literal["cls", "mean", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pool(hidden: Array, batch: EncoderBatch, pooling: Pooling) -> Array:
    """`hidden [T, d]` to a float32 vector for each row of output, `[S, d]`.

    Args:
        hidden: of all tokens.
        batch: which of them belong together.
        pooling: the first token, the mean of all, or the last one. (BERT calls its first "CLS".)
    """
    if pooling == "mean":
        sums = jax.ops.segment_sum(
            hidden.astype(jnp.float32), batch.segment_ids, num_segments=len(batch.lengths)
        )
        return sums / batch.lengths[:, None]
    rows = batch.first_rows + (batch.lengths - 1 if pooling == "last" else 0)
    return hidden[rows].astype(jnp.float32)


def normalize(vectors: Array) -> Array:
    """Scale each row of `[S, d]` to the length 1; a row of zeros stays what it is."""
    lengths = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.maximum(lengths, 1e-12)
