"""Drafts that the step before made on the device. Host only.

A speculator, a draft model or suffix decoding is a part of the step program (`engine/drafting.py`,
`engine/suffix_matching.py`): its drafts come to the host with the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from arctic_jax.request import Request
from arctic_jax.scheduled_batch import ScheduledBatch
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.host_proposer import HostProposer
from arctic_jax.speculative_config import SpeculativeConfig

if TYPE_CHECKING:  # it imports jax, which this package does without
    from arctic_jax.batch import HostOutput

_LEAST_GAIN = 0.1  # tokens, for rows that others wait for


class DeviceProposer(HostProposer):
    """The methods `arctic`, `mlp_speculator` and `draft_model`, and whatever else is on the device.

    Drafts are verified by steps that begin before the host has seen them, and nobody waits. So what
    a draft promises is taken from the one before it, and all that drafts cost is that the steps of
    all requests take longer: they are made if together they promise more.

    To make drafts takes time, too. While they promise too little the device drafts only now and
    then, within an allowance, to see whether that has changed.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        super().__init__(config)
        self.wants_drafts = True
        # Of the step whose results came last: what its last round drafted, and those before.
        self._drafted: dict[Request, list[int]] = {}
        self._drafted_before: list[dict[Request, list[int]]] = []
        self._makes = False  # whether the last step's drafts were worth it

    def start(self, request: Request) -> None:
        """See `HostProposer`."""

    def observe(self, tokens: Mapping[Request, Sequence[int]]) -> None:
        """See `HostProposer`."""

    def stop(self, request: Request) -> None:
        """See `HostProposer`."""

    def propose(self, scheduled: ScheduledBatch, output: HostOutput) -> None:
        """See `Proposer`."""
        first = scheduled.requests[: self.config.disable_by_batch_size] if scheduled.drafts else ()
        *self._drafted_before, self._drafted = (
            {p.request: d for p, d in zip(first, drafts, strict=True) if p.samples}
            for index in range(scheduled.num_rounds)
            for drafts in [output.drafts_of(index, len(first))]
        )
        for part in scheduled.requests:
            part.request.runs_ahead = True
        self._makes = False
        super().propose(scheduled, output)
        self.wants_drafts = not self.hard_disabled
        if self.config.adaptive:
            # Not before it is known what steps without take: drafting is compared with them.
            known = self.costs.plain(len(self._progress)) > 0
            self.wants_drafts &= known and (self._makes or self._for_drafting.steps > 0)

    def drafts(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        """See `HostProposer`; its tokens have no probabilities, so each counts as one."""
        return [
            _draft(self._drafted.get(request, [])[:limit])
            for request, limit in zip(requests, limits, strict=True)
        ]

    def guess_of(self, request: Request, index: int) -> Draft:
        """See `HostProposer`."""
        return _draft(self._drafted_before[index - 1].get(request, []))

    def _make_those_worth(self, found: Mapping[Request, Draft], waited: set[Request]) -> None:
        ahead = {request: draft for request, draft in found.items() if draft.on_device}
        if len(ahead) < len(found):
            rest = {r: draft for r, draft in found.items() if r not in ahead}
            super()._make_those_worth(rest, waited)
        trust, num_requests = self._trust.value(), len(self._progress)
        gains: dict[Request, float] = {}
        for request, draft in ahead.items():
            progress = self._progress[request]
            progress.acceptance.has_found(True)  # there is nothing to look for
            if draft.token_ids:
                gains[request] = len(draft.token_ids) * progress.acceptance.trust.value(trust)
                if progress.guess is None or request.verifies:
                    progress.remember(draft, len(request.output_token_ids))
        gains = {request: gain for request, gain in gains.items() if gain >= _LEAST_GAIN}
        if sum(gains.values()) >= num_requests * self.costs.of_step(num_requests):
            self._makes = True
            for request in gains:
                self._make(request, ahead[request])
            self.costs.made(num_requests, len(gains), 0)

    def _make(self, request: Request, draft: Draft) -> None:
        if not (draft.on_device and request.num_pending):
            request.runs_ahead &= not draft.parents  # the host says where a tree's tokens go
            super()._make(request, draft)
            return
        if not self.wants_drafts:  # as when the step now on the device began: it does not draft
            return
        progress = self._progress[request]
        progress.remember(draft, len(request.output_token_ids))
        most = self.config.num_drafted_on_device
        request.num_drafted_ahead = min(progress.acceptance.length, most)


def _draft(tokens: list[int]) -> Draft:
    """Return a draft of the device's; it ends with the first -1."""
    tokens = tokens[: tokens.index(-1)] if -1 in tokens else tokens
    return Draft(tokens, [1.0] * len(tokens), on_device=True)
