"""A draft: what a proposer thinks comes next. Host only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arctic_jax.spec_decode import draft_tree


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        token_ids: the tokens.
        probs: how probable it is that each is accepted.
        score: their sum, as the drafter itself adds them up; 0 of one that does not.
        parents: of a tree, see `draft_tree`; empty if each token follows the one before it. Tokens
            that follow the same one differ.
        on_device: the device has made it, and can verify the next one before the host sees it.
    """

    token_ids: Sequence[int] = ()
    probs: Sequence[float] = ()
    score: float = 0.0
    parents: Sequence[int] = ()
    on_device: bool = False

    @staticmethod
    def of_tree(
        token_ids: Sequence[int], parents: Sequence[int], probs: Sequence[float], score: float
    ) -> Draft:
        """Make one of a tree whose tokens are in any order, parents before children."""
        order = draft_tree.depth_first(parents, probs)
        return Draft(
            [token_ids[i] for i in order],
            [probs[i] for i in order],
            score,
            draft_tree.reorder(parents, order),
        )

    def first_path(self) -> Draft:
        """Return what is left of a tree without its branches."""
        if not self.parents:
            return self
        length = draft_tree.path_length(self.parents)
        return Draft(self.token_ids[:length], self.probs[:length], sum(self.probs[:length]))

    def expected_after(self, num_tokens: int) -> float:
        """Return how many tokens should be accepted beside the next so many."""
        if not self.parents:
            return sum(self.probs[num_tokens:])
        depths = draft_tree.depths(self.parents)
        return sum(p for p, depth in zip(self.probs, depths, strict=True) if depth > num_tokens)
