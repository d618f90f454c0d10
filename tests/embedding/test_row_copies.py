"""The first rows of a batch on their way to the host."""

import jax.numpy as jnp
import numpy as np
import pytest

from arctic_jax.embedding.row_copies import RowCopies
from arctic_jax.encoder_batch import EncoderBucket
from arctic_jax.shift_parallel import make_mesh

LONE, MANY = EncoderBucket(64, 1), EncoderBucket(64, 4)


@pytest.mark.parametrize(
    ("bucket", "count", "rows", "memory"),
    [
        (LONE, 1, 8, "pinned_host"),
        (MANY, 2, 2, "device"),
        (MANY, 3, 8, "device"),
        (MANY, 32, 32, "device"),
    ],
)
def test_the_rows_asked_for_come_and_few_others(bucket, count, rows, memory) -> None:
    vectors = jnp.arange(bucket.max_segments * 5, dtype=jnp.float32).reshape(-1, 5)
    copied = RowCopies([LONE, MANY], make_mesh(1, 1), 5).start(vectors, bucket, count)
    assert copied.sharding.memory_kind == memory
    np.testing.assert_array_equal(copied, vectors[:rows])
