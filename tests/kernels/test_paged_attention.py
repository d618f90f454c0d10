"""How decode attention divides its work; its results are tested in test_kernels.py."""

import jax.numpy as jnp
import pytest

from arctic_jax.pallas_kernels.paged_attention.mosaic_gpu import (
    Config,
    in_parts,
    splits_of,
    takes,
)

AT_MOST_8 = Config(tile=64, stages=2, splits=8)


@pytest.mark.parametrize(
    ("lengths", "splits"),
    [
        ([1024] * 32, [1] * 32),  # enough to do for every multiprocessor
        ([1000, 1100, 1050, 1070] * 8, [1] * 32),  # nearly equal, as streams are
        ([1000] * 31 + [8000], [1] * 31 + [7]),  # the long one is no longer on its way
        ([1024] * 4 + [0] * 28, [4] * 4 + [1] * 28),  # 32 splits of heads for 132
        ([64, 0], [1, 1]),  # one tile
        ([8192], [8]),
        ([0, 0], [1, 1]),
    ],
)
def test_long_contexts_are_split(lengths, splits):
    found = splits_of(jnp.array(lengths), KV=8, sliding_window=None, config=AT_MOST_8)
    assert found.tolist() == splits


def test_a_window_is_all_that_is_split():
    found = splits_of(jnp.array([512, 9000]), KV=128, sliding_window=512, config=AT_MOST_8)
    assert found.tolist() == [1, 1]


def test_without_room_for_splits_nothing_is_split():
    config = Config(tile=64, stages=2, splits=1)
    assert splits_of(jnp.array([9, 9000]), 8, None, config).tolist() == [1, 1]


def test_each_part_of_the_queries_ends_where_its_last_one_stands():
    starts, lengths = in_parts(jnp.array([0, 5, 6, 6]), jnp.array([100, 7, 0]), 2, 4)
    assert starts.tolist() == [0, 4, 5, 6, 6, 6, 6]
    assert lengths.tolist() == [99, 100, 7, 0, 0, 0]


@pytest.mark.parametrize(
    ("queries", "group", "few"), [(17, 4, True), (33, 4, False), (16, 8, True), (17, 8, False)]
)
def test_drafts_are_verified_by_decode_attention(queries, group, few):
    assert takes(queries, group) == few
