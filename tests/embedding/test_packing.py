"""Batches of texts: nothing lost, nothing doubled, nothing too long, and little padding."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_jax.embedding.packing import Packer, Plan, bucket_ladder, cost
from arctic_jax.encoder_batch import EncoderBucket

LADDER = bucket_ladder(1024, 512)


def plans_of(
    lengths: Sequence[int], rest: bool = True, ladder: Sequence[EncoderBucket] = LADDER
) -> list[Plan]:
    packer = Packer(ladder)
    packer.add(enumerate(lengths))
    plans = []
    while plan := packer.take(rest=rest):
        plans.append(plan)
    return plans


def check(
    plans: Sequence[Plan], lengths: Sequence[int], ladder: Sequence[EncoderBucket] = LADDER
) -> None:
    numbers = [number for plan in plans for number in plan.lengths]
    assert len(numbers) == len(set(numbers))
    for plan in plans:
        assert plan.bucket in ladder
        assert len(plan.windows) == plan.bucket.num_windows
        assert 1 <= len(plan.lengths) <= plan.bucket.max_segments
        assert list(plan.lengths) == [number for window in plan.windows for number in window]
        for window in plan.windows:
            assert sum(lengths[number] for number in window) <= plan.bucket.window


@given(st.lists(st.integers(1, 512), max_size=60))
@settings(max_examples=100, deadline=None)
def test_every_text_is_in_one_batch(lengths: list[int]) -> None:
    plans = plans_of(lengths)
    check(plans, lengths)
    assert {n for plan in plans for n in plan.lengths} == set(range(len(lengths)))


@given(st.lists(st.integers(1, 512), max_size=60))
@settings(max_examples=50, deadline=None)
def test_only_full_batches_without_the_rest(lengths: list[int]) -> None:
    plans = plans_of(lengths, rest=False)
    check(plans, lengths)
    left = sum(lengths) - sum(sum(plan.lengths.values()) for plan in plans)
    assert left < 1024


def test_an_idle_device_gets_the_largest_batch_that_can_be_filled() -> None:
    packer = Packer(bucket_ladder(4096, 512, skips_other_segments=True))
    packer.add(enumerate([50] * 30))
    assert packer.take(rest=False) is None
    plan = packer.take(rest=False, idle=True)
    assert plan is not None
    assert plan.bucket == EncoderBucket(1024, 1)
    assert len(plan.lengths) == 20
    left = packer.take(rest=False, idle=True)  # of ten
    assert left is not None
    assert left.bucket == EncoderBucket(256, 1)
    packer.add([(30, 257)])
    assert packer.take(rest=False, idle=True) is None  # 257 + 5 * 50 tokens do not fill 512


def test_what_is_left_goes_into_two_batches_rather_than_half_a_large_one() -> None:
    plans = plans_of([512] * 33, ladder=bucket_ladder(32768, 512, skips_other_segments=True))
    assert [plan.bucket.num_tokens for plan in plans] == [16384, 512]
    plans = plans_of([512] * 5, ladder=bucket_ladder(32768, 512, skips_other_segments=True))
    assert [plan.bucket.num_tokens for plan in plans] == [4096]


def share_of_padding(lengths: Sequence[int]) -> float:
    return 1 - sum(lengths) / sum(plan.bucket.num_tokens for plan in plans_of(lengths))


def test_mixed_lengths_leave_little_padding() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(np.log(80), 0.9, 2000)), 16, 512).astype(int).tolist()
    assert share_of_padding(lengths) < 0.03


@pytest.mark.parametrize("length", [16, 50, 64, 70, 100, 128, 256, 384, 512])
def test_equal_lengths_leave_little_padding(length: int) -> None:
    # Most at 70, each in a window of 80: so few keys to attend to are worth it.
    assert share_of_padding([length] * 1000) < 0.28


@pytest.mark.parametrize(("length", "window"), [(1, 12), (12, 12), (13, 20), (50, 64), (400, 512)])
def test_one_text_takes_the_smallest_window(length: int, window: int) -> None:
    (plan,) = plans_of([length])
    assert (plan.bucket.window, plan.bucket.num_windows) == (window, 1)


def test_a_removed_text_is_in_no_batch() -> None:
    packer = Packer(LADDER)
    packer.add([(0, 5), (1, 5), (2, 9)])
    packer.remove(1, 5)
    packer.remove(2, 9)
    packer.remove(7, 9)  # never was there
    assert len(packer) == 1
    assert list(packer.take(rest=True).lengths) == [0]
    assert packer.take(rest=True) is None


def test_a_text_longer_than_every_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="513 tokens"):
        plans_of([513])


@given(st.lists(st.integers(1, 512), max_size=60))
@settings(max_examples=50, deadline=None)
def test_wide_windows_hold_every_text(lengths: list[int]) -> None:
    ladder = bucket_ladder(2048, 512, skips_other_segments=True)
    plans = plans_of(lengths, ladder=ladder)
    check(plans, lengths, ladder)
    assert {n for plan in plans for n in plan.lengths} == set(range(len(lengths)))


@pytest.mark.parametrize(
    ("max_tokens", "max_length", "widest"),
    [(32768, 512, 32768), (32768, 40, 32768), (40_001, 512, 40_000), (1024, 1025, 1088)],
)
def test_wide_windows_are_few_and_multiples_of_64(
    max_tokens: int, max_length: int, widest: int
) -> None:
    ladder = bucket_ladder(max_tokens, max_length, skips_other_segments=True)
    assert all(bucket.window % 64 == 0 for bucket in ladder)
    assert ladder[-1] == EncoderBucket(widest, 1)
    assert ladder[0] == EncoderBucket(64, 1)
    assert len(ladder) <= 11


def test_wide_windows_leave_hardly_any_padding() -> None:
    plans = plans_of([50] * 2000, ladder=bucket_ladder(32768, 512, skips_other_segments=True))
    assert [plan.bucket.num_tokens for plan in plans] == [32768] * 3 + [2048]
    assert all(sum(plan.lengths.values()) > 0.99 * plan.bucket.num_tokens for plan in plans[:-1])


@pytest.mark.parametrize("max_length", [40, 256, 512, 8192])
@pytest.mark.parametrize("max_tokens", [64, 1024, 16384])
def test_the_shapes_are_few_and_hold_the_longest_text(max_tokens: int, max_length: int) -> None:
    ladder = bucket_ladder(max_tokens, max_length)
    assert len(ladder) <= 70
    assert list(map(cost, ladder)) == sorted(map(cost, ladder))
    assert max(bucket.window for bucket in ladder) >= max_length
    assert all(b.num_tokens <= max(max_tokens, b.window) for b in ladder)
