"""Drafts that are trees: order, positions, masks, and what a proposer learns from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_jax.request import Request, SamplingParams
from arctic_jax.scheduled_batch import ScheduledRequest
from arctic_jax.spec_decode import draft_tree
from arctic_jax.spec_decode.acceptance import Acceptance
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.speculation_stats import SpeculationStats

TREES = st.integers(0, 31).flatmap(
    lambda n: st.tuples(
        st.tuples(*(st.integers(-1, i - 1) for i in range(n))),
        st.lists(st.floats(0.1, 1.0), min_size=n, max_size=n),
    )
)


def path(parents: list[int] | tuple[int, ...], token: int) -> list[int]:
    """The tokens up to one, from the first."""
    return [] if token < 0 else [*path(parents, parents[token]), token]


@given(TREES)
def test_a_draft_is_the_same_tree_with_the_likeliest_path_first(tree: tuple) -> None:
    parents, shares = tree
    probs: list[float] = []
    for parent, share in zip(parents, shares, strict=True):
        probs.append(share * (probs[parent] if parent >= 0 else 1.0))
    draft = Draft.of_tree(range(100, 100 + len(parents)), parents, probs, sum(probs))
    moved = list(draft.parents) or list(range(-1, len(parents) - 1))
    before = {tuple(path(parents, i)) for i in range(len(parents))}
    after = [[draft.token_ids[j] - 100 for j in path(moved, i)] for i in range(len(moved))]
    assert {tuple(names) for names in after} == before
    assert [draft.probs[i] for i in range(len(moved))] == [probs[names[-1]] for names in after]
    # Greedily the likeliest child first, and a subtree is not left before it is complete.
    for i, parent in enumerate(moved):
        siblings = [j for j, other in enumerate(moved) if other == parent]
        assert [draft.probs[j] for j in siblings] == sorted(
            (draft.probs[j] for j in siblings), reverse=True
        )
        assert parent in [*path(moved, i - 1), -1]
    first = draft_tree.path_length(moved)
    assert moved[:first] == list(range(-1, first - 1))
    assert bool(draft.parents) == (first < len(moved))


@given(TREES)
def test_a_token_sees_what_it_comes_after(tree: tuple) -> None:
    parents, _ = tree
    masks, depths = draft_tree.draft_masks(parents), draft_tree.depths(parents)
    for token, (mask, depth) in enumerate(zip(masks, depths, strict=True)):
        assert -(2**31) <= mask < 0  # a word whose sign bit is set
        seen = [j for j in range(token + 1) if (mask >> (token - j)) & 1]
        assert seen == path(parents, token)
        assert depth == len(seen)
        assert mask | (2 ** (token + 1) - 1) == -1  # all known tokens


def part_of(parents: tuple[int, ...], accepted: tuple[int, ...]) -> ScheduledRequest:
    request = Request("r", 0, [1] * 10, SamplingParams(), 50)
    rows = 1 + len(parents)
    return ScheduledRequest(request, 9, rows, rows, True, len(parents), parents, accepted)


def test_what_is_accepted_beside_the_first_path_moves() -> None:
    tree = (-1, 0, 1, 0, 3)
    assert part_of(tree, (0, 3, 4)).moves == [(13, 11), (14, 12)]
    assert part_of(tree, (0, 1)).moves == []
    assert part_of(tree, ()).moves == []


def test_a_request_drafts_as_many_tokens_as_it_took() -> None:
    tree, probs = (-1, 0, 1, 0, 3), (0.9, 0.5, 0.4, 0.3, 0.2)
    assert draft_tree.num_needed(tree, probs, ()) == 0
    assert draft_tree.num_needed(tree, probs, (0,)) == 1
    assert draft_tree.num_needed(tree, probs, (0, 3)) == 4  # three were likelier than the last
    assert draft_tree.num_needed(tree, probs, (0, 3, 4)) == 5
    assert draft_tree.num_needed(tree, probs, (0, 1, 2)) == 5  # it ends at a leaf: right
    acceptance = Acceptance(8)
    acceptance.learn(5, sum(probs), 2, draft_tree.num_needed(tree, probs, (0, 3)))
    assert acceptance.length == 5
    acceptance.learn(5, sum(probs), 3, draft_tree.num_needed(tree, probs, (0, 1, 2)))
    assert acceptance.length == 8


def test_statistics_are_by_depth_and_gains_by_what_is_not_drawn_already() -> None:
    stats = SpeculationStats.zeros(5)
    stats.add(5, 2, (-1, 0, 1, 0, -1))
    assert stats.drafted.tolist() == [2, 2, 1, 0, 0]
    assert stats.accepted.tolist() == [1, 1, 0, 0, 0]
    draft = Draft([1, 2, 3, 4, 5], [0.5, 0.4, 0.3, 0.2, 0.1], 1.5, (-1, 0, 1, 0, -1))
    assert draft.expected_after(0) == pytest.approx(1.5)
    assert draft.expected_after(1) == pytest.approx(0.9)
    assert draft.expected_after(2) == pytest.approx(0.3)
