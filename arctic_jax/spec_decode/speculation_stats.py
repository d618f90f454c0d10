"""What came of an engine's drafts, counted. Host only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arctic_jax.spec_decode import draft_tree


@dataclass
class SpeculationStats:
    """What came of an engine's drafts.

    Attributes:
        num_drafts: steps of a request that verified a draft.
        drafted: `[max_draft_len]` tokens verified at each position of a draft. Of one that is a
            tree there can be several for the same place in the answer.
        accepted: `[max_draft_len]` those of them that were right, with all before them.
    """

    num_drafts: int
    drafted: np.ndarray
    accepted: np.ndarray

    @staticmethod
    def zeros(max_draft_len: int) -> SpeculationStats:
        """Make those of an engine that has not drafted yet."""
        return SpeculationStats(0, np.zeros(max_draft_len, int), np.zeros(max_draft_len, int))

    def add(self, num_drafted: int, num_accepted: int, parents: Sequence[int] = ()) -> None:
        """Count one draft."""
        self.num_drafts += 1
        if parents:
            np.add.at(self.drafted, np.array(draft_tree.depths(parents)) - 1, 1)
        else:
            self.drafted[:num_drafted] += 1
        self.accepted[:num_accepted] += 1
