"""Drafts that are trees: the order of their tokens, and what a step needs to know. Host only.

A tree is given by its tokens' parents: of each token the index of the one that it follows, -1 for
the last token that is known. Parents come before their children. Where each token follows the one
before it, the tree is a path, and its parents are left out.
"""

from __future__ import annotations

from collections.abc import Sequence


def depth_first(parents: Sequence[int], probs: Sequence[float]) -> list[int]:
    """Return the tokens' indices, the likeliest path first, then what branches off last.

    A path that is accepted is then mostly a prefix of the draft.
    """
    children: dict[int, list[int]] = {}
    for token, parent in enumerate(parents):
        children.setdefault(parent, []).append(token)
    order: list[int] = []
    stack = [-1]
    while stack:
        token = stack.pop()
        if token >= 0:
            order.append(token)
        stack += sorted(children.get(token, ()), key=lambda child: probs[child])
    return order


def reorder(parents: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return the parents of the tokens in their new order; empty for a path."""
    place = {token: i for i, token in enumerate(order)} | {-1: -1}
    moved = [place[parents[token]] for token in order]
    return [] if moved == list(range(-1, len(moved) - 1)) else moved


def depths(parents: Sequence[int]) -> list[int]:
    """Return how many places after the last known token each one comes."""
    found: list[int] = []
    for parent in parents:
        found.append(1 + (found[parent] if parent >= 0 else 0))
    return found


def draft_masks(parents: Sequence[int]) -> list[int]:
    """Return the `draft_mask` of each token: it sees its ancestors, itself and all before them."""
    hidden: list[int] = []
    for token, parent in enumerate(parents):
        between = (1 << (token - parent)) - 2
        hidden.append(between | (hidden[parent] << (token - parent) if parent >= 0 else 0))
    return [~bits for bits in hidden]


def path_length(parents: Sequence[int]) -> int:
    """Return how many tokens of a depth-first tree are its first path."""
    branch = (i for i, parent in enumerate(parents) if parent != i - 1)
    return next(branch, len(parents))


def num_needed(parents: Sequence[int], probs: Sequence[float], accepted: Sequence[int]) -> int:
    """Return how many tokens, the likeliest first, hold the accepted ones.

    All of them, if nothing in the tree comes after those: they could not have been more.
    """
    if not accepted:
        return 0
    if accepted[-1] not in parents:
        return len(parents)
    least = probs[accepted[-1]]
    return 1 + sum(prob > least for prob in probs)
