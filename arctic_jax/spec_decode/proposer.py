"""Who proposes drafts to the engine. Host only, no jax; owned by the engine thread.

A new way to draft is a class with this protocol and a row in `build_proposer`; those that derive
from `HostProposer` say only what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from arctic_jax.request import Request
from arctic_jax.scheduled_batch import ScheduledBatch
from arctic_jax.spec_decode import draft_tree
from arctic_jax.speculative_config import SpeculativeConfig

if TYPE_CHECKING:  # it imports jax, which this package does without
    from arctic_jax.batch import HostOutput


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


class Proposer(Protocol):
    """Gives requests drafts after each step.

    Attributes:
        stats: what came of them.
        wants_drafts: whether the next step shall draft on the device, if there is what can.
    """

    stats: SpeculationStats
    wants_drafts: bool

    def propose(self, scheduled: ScheduledBatch, output: HostOutput) -> None:
        """Set `Request.draft` of the requests of a step whose results, `output`, were taken.

        A draft comes after the known tokens. Those that are still being drawn are not known: such
        a draft makes the request wait for them, and is then replaced by a new one.
        """
        ...

    def finish(self, request: Request) -> None:
        """Drop what is remembered of an ended request, which may never have been proposed for."""
        ...


class NoProposer:
    """Proposes nothing."""

    wants_drafts = False

    def __init__(self) -> None:
        self.stats = SpeculationStats.zeros(0)

    def propose(self, scheduled: ScheduledBatch, output: HostOutput) -> None:
        """See `Proposer`."""

    def finish(self, request: Request) -> None:
        """See `Proposer`."""


def build_proposer(config: SpeculativeConfig) -> Proposer:
    """Make the proposer that a user asked for; the only place that reads the method."""
    if config.is_hybrid and not config.suffix_on_device:
        from arctic_jax.spec_decode.hybrid_proposer import HybridProposer

        return HybridProposer(config)
    if config.drafts_on_device:
        from arctic_jax.spec_decode.device_proposer import DeviceProposer

        return DeviceProposer(config)
    if config.kind == "suffix":
        from arctic_jax.spec_decode.suffix_proposer import SuffixProposer  # it loads numba

        return SuffixProposer(config)
    if config.kind == "ngram":
        from arctic_jax.spec_decode.ngram_proposer import NgramProposer

        return NgramProposer(config)
    return NoProposer()
