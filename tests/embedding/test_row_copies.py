"""The first rows of a batch on their way to the host."""

import jax.numpy as jnp
import numpy as np
import pytest

from arctic_jax.embedding.row_copies import RowCopies
from arctic_jax.encoder_batch import EncoderBucket
from arctic_jax.shift_parallel import make_mesh

SHORT, LONG = EncoderBucket(64, 1), EncoderBucket(1024, 1)


@pytest.mark.parametrize(
    ("bucket", "count", "rows", "memory"),
    [
        (SHORT, 1, 8, "pinned_host"),
        (LONG, 8, 8, "device"),
        (LONG, 9, 32, "device"),
        (LONG, 128, 128, "device"),
    ],
)
def test_the_rows_asked_for_come_and_few_others(bucket, count, rows, memory) -> None:
    vectors = jnp.arange(bucket.max_segments * 5, dtype=jnp.float32).reshape(-1, 5)
    copied = RowCopies([SHORT, LONG], make_mesh(1, 1), 5).start(vectors, bucket, count)
    assert copied.sharding.memory_kind == memory
    np.testing.assert_array_equal(copied, vectors[:rows])
