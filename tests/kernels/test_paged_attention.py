"""How decode attention divides its work; most of its results are tested in test_kernels.py."""

import functools

import jax.numpy as jnp
import pytest
from kernel_checks import check, interpreted

from arctic_jax.pallas_kernels.paged_attention import cases
from arctic_jax.pallas_kernels.paged_attention.mosaic_gpu import (
    Config,
    choose_config,
    decode,
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


# benchmarks/results/h200/decode_tiles.json
@pytest.mark.parametrize(("sequences", "tile"), [(1, 64), (16, 128), (17, 64), (64, 64)])
def test_tiles_are_larger_with_a_thread_block_a_multiprocessor(sequences, tile):
    assert choose_config(sequences, 8, 128, 132, 64).tile == tile
    assert choose_config(sequences, 8, 256, 132, 64).tile == 64  # there is no room for more


@pytest.mark.parametrize("name", ["decode_llama_8b", "splits_smollm2", "decode_block16"])
def test_larger_tiles_give_the_same(name, capsys):
    (case,) = (case for case in cases.CASES if case.name == name)
    config = Config(128, 2, 2)
    with interpreted(capsys) as interpreter:
        call = functools.partial(decode, draft_mask=None, config=config, interpret=interpreter)
        check(cases, case, call, poison=float("nan"))


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
