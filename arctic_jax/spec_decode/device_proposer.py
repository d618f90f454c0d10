"""Drafts that the step before made on the device, by a network beside the model. Host only.

A speculator or a draft model is a part of the step program (`engine/drafting.py`): its drafts come
to the host with the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from arctic_jax.request import Request
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.host_proposer import HostProposer
from arctic_jax.speculative_config import SpeculativeConfig

if TYPE_CHECKING:  # it imports jax, which this package does without
    from arctic_jax.batch import HostOutput, ScheduledBatch


class DeviceProposer(HostProposer):
    """The methods `arctic`, `mlp_speculator` and `draft_model`.

    Drafts do not become shorter after wrong ones, as those that are made on the host: they are
    there already, and a row more of a step costs next to nothing. One draft follows the other, so
    that it counts for little that the steps launched ahead are left and come back to.
    """

    portions_to_begin = 1

    def __init__(self, config: SpeculativeConfig) -> None:
        super().__init__(config)
        self._drafted: dict[Request, list[int]] = {}

    def start(self, request: Request) -> None:
        """See `HostProposer`."""

    def observe(self, tokens: Mapping[Request, Sequence[int]]) -> None:
        """See `HostProposer`."""

    def stop(self, request: Request) -> None:
        """See `HostProposer`."""

    def propose(self, scheduled: ScheduledBatch, output: HostOutput) -> None:
        """See `Proposer`."""
        first = scheduled.requests[: self.config.disable_by_batch_size]
        drafts = output.drafts[: len(first)].tolist()
        self._drafted = {p.request: d for p, d in zip(first, drafts, strict=True) if p.samples}
        super().propose(scheduled, output)

    def drafts(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        """See `HostProposer`; its tokens have no probabilities, so each counts as one."""
        found = [
            self._drafted.get(request, [])[:limit]
            for request, limit in zip(requests, limits, strict=True)
        ]
        return [Draft(tokens, [1.0] * len(tokens)) for tokens in found]

    def _limit(self, request: Request) -> int:
        return min(self.config.max_draft_len, request.max_draft_len)
