"""Who proposes drafts to the engine. Host only, no jax; owned by the engine thread.

A new way to draft is a class with this protocol and a row in `build_proposer`; those that derive
from `HostProposer` say only what comes next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from arctic_jax.request import Request
from arctic_jax.scheduled_batch import ScheduledBatch
from arctic_jax.spec_decode.speculation_stats import SpeculationStats
from arctic_jax.speculative_config import SpeculativeConfig

if TYPE_CHECKING:  # it imports jax, which this package does without
    from arctic_jax.batch import HostOutput


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
