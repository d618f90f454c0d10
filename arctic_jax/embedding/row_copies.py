"""From a batch's vectors on the device to rows on the host, no more of them than are used.

A batch has room for many short texts and often holds few long ones: of 12 MB of rows 2 are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from arctic_jax import host_copies
from arctic_jax.encoder_batch import EncoderBucket

SHARES = (16, 4, 1)
"""Of a batch's rows there are programs that copy 1/16, 1/4 and all."""
SHORT = 512
"""Tokens of a batch for whose rows somebody waits."""


class RowCopies:
    """The programs that copy the first rows of every shape's vectors.

    Args:
        ladder: the shapes.
        mesh: one device, which has memory of its own.
        dimension: numbers of a vector.
    """

    def __init__(self, ladder: Iterable[EncoderBucket], mesh: Mesh, dimension: int) -> None:
        with ThreadPoolExecutor() as threads:
            jobs = {
                (bucket, rows): threads.submit(_program, bucket, rows, mesh, dimension)
                for bucket in ladder
                for rows in _sizes(bucket)
            }
        self._programs = {key: job.result() for key, job in jobs.items()}

    def start(self, vectors: Array, bucket: EncoderBucket, count: int) -> Array:
        """Start to copy the first `count` rows of `vectors [S, dimension]`, or some more."""
        rows = next(rows for rows in _sizes(bucket) if rows >= count)
        copied = self._programs[bucket, rows](vectors)
        host_copies.start(copied)
        return copied


def _sizes(bucket: EncoderBucket) -> list[int]:
    """Return how many rows programs copy, the fewest first; of a short batch's few always all."""
    shares = (1,) if bucket.num_tokens <= SHORT else SHARES
    return sorted({-(-bucket.max_segments // share) for share in shares})


def _program(bucket: EncoderBucket, rows: int, mesh: Mesh, dimension: int) -> Compiled:
    """Return the program that copies so many rows.

    Those of a short batch go into the host's memory as a part of the program: a transfer that the
    runtime starts afterwards comes 0.4 to 1 ms later (benchmarks/results/h200/pinned_output.json).
    Others have time, and are transferred while the device computes the next batch.
    """
    device = NamedSharding(mesh, PartitionSpec())
    there = device.with_memory_kind("pinned_host") if bucket.num_tokens <= SHORT else device
    vectors = jax.ShapeDtypeStruct((bucket.max_segments, dimension), jnp.float32, sharding=device)
    return jax.jit(lambda v: jnp.copy(v[:rows]), out_shardings=there).lower(vectors).compile()
