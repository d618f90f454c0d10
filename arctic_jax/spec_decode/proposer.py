"""Who proposes drafts to the engine, and when. Host only, no jax; owned by the engine thread.

A new way to draft is a class with this protocol and a row in `build_proposer`; those that derive
from `HostProposer` say only what comes next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from arctic_jax.request import Request, RequestStatus
from arctic_jax.spec_decode import draft_tree
from arctic_jax.spec_decode.acceptance import Acceptance
from arctic_jax.spec_decode.draft_costs import DraftCosts
from arctic_jax.speculative_config import SpeculativeConfig

if TYPE_CHECKING:  # it imports jax, which this package does without
    from arctic_jax.batch import HostOutput, ScheduledBatch, ScheduledRequest


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        token_ids: the tokens.
        probs: how probable it is that each is accepted.
        score: their sum, as the drafter itself adds them up; 0 of one that does not.
        parents: of a tree, see `draft_tree`; empty if each token follows the one before it. Tokens
            that follow the same one differ.
    """

    token_ids: Sequence[int] = ()
    probs: Sequence[float] = ()
    score: float = 0.0
    parents: Sequence[int] = ()

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
    """Gives requests drafts after each step."""

    stats: SpeculationStats

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

    def __init__(self) -> None:
        self.stats = SpeculationStats.zeros(0)

    def propose(self, scheduled: ScheduledBatch, output: HostOutput) -> None:
        """See `Proposer`."""

    def finish(self, request: Request) -> None:
        """See `Proposer`."""


_NEW = 0.02  # share of what is new in the mean over all requests


@dataclass
class _Progress:
    """One request: how many output tokens were observed, and what its drafts are worth."""

    acceptance: Acceptance
    num_observed: int = 0
    probs: Sequence[float] = field(default=())


class HostProposer:
    """Decides on the host which drafts there shall be; its subclasses say what they are.

    Args:
        config: lengths, cut-offs, and whether drafts follow their success.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self.config = config
        self.stats = SpeculationStats.zeros(config.max_draft_len)
        self._progress: dict[Request, _Progress] = {}  # in the order of their first steps
        self.costs = DraftCosts()
        self._trust = 1.0  # of all requests, of late: that of a new one

    def start(self, request: Request) -> None:
        """Get to know a request, of which only the prompt is told."""
        raise NotImplementedError

    def observe(self, tokens: Mapping[Request, Sequence[int]]) -> None:
        """Get to know the new output tokens of requests."""
        raise NotImplementedError

    def drafts(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        """Draft for requests that were started and observed, each at most its limit of tokens."""
        raise NotImplementedError

    def stop(self, request: Request) -> None:
        """Forget a request that was started."""
        raise NotImplementedError

    def propose(self, scheduled: ScheduledBatch, output: HostOutput) -> None:
        """See `Proposer`."""
        if self.config.adaptive:
            self.costs.took(scheduled.requests)
        for part in scheduled.requests:
            if part.num_drafted:
                self.stats.add(part.num_drafted, part.num_accepted, part.parents)
                if part.request in self._progress:
                    self._learn(part)
        going_on = [p.request for p in scheduled.requests if not p.request.status.finished]
        requests = [request for request in going_on if request.output_token_ids]
        self._observe(requests)
        running = [request for request in requests if request.status is RequestStatus.RUNNING]
        limits = {request: self._limit(request) for request in self._within_cut_offs(running)}
        drafting = [request for request, limit in limits.items() if limit > 0]
        for request in running:
            request.draft = request.draft_parents = ()
        drafts = self.drafts(drafting, [limits[request] for request in drafting])
        num_requests = sum(part.samples for part in scheduled.requests)
        if self.config.adaptive and self.costs.must_be_measured(num_requests):
            return
        least = self.costs.min_gain(num_requests)
        for request, draft in zip(drafting, drafts, strict=True):
            self._keep_if_worth(request, draft, least)

    def finish(self, request: Request) -> None:
        """See `Proposer`."""
        self.costs.forget(request)
        if self._progress.pop(request, None) is not None:
            self.stop(request)

    @property
    def hard_disabled(self) -> bool:
        """Whether there are so many requests that nobody drafts."""
        hard = self.config.hard_disable_by_batch_size
        return hard is not None and len(self._progress) >= hard

    def _learn(self, part: ScheduledRequest) -> None:
        progress = self._progress[part.request]
        if self.config.adaptive:
            probs = progress.probs[: part.num_drafted]
            needed = part.num_accepted
            if part.parents:
                needed = draft_tree.num_needed(part.parents, probs, part.accepted)
            progress.acceptance.verified(part.num_drafted, sum(probs), part.num_accepted, needed)
            self._trust += _NEW * (progress.acceptance.trust - self._trust)

    def _observe(self, requests: Sequence[Request]) -> None:
        new = {}
        for request in requests:
            if request not in self._progress:
                self._progress[request] = _Progress(
                    Acceptance(self.config.max_draft_len, trust=self._trust)
                )
                self.start(request)
            progress, output = self._progress[request], request.output_token_ids
            if progress.num_observed < len(output):
                new[request] = output[progress.num_observed :]
                progress.num_observed = len(output)
        self.observe(new)

    def _within_cut_offs(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Keep those that may draft: none in large batches, the longest known in medium ones."""
        if self.hard_disabled:
            return []
        if len(self._progress) <= self.config.disable_by_batch_size:
            return requests
        first = set(list(self._progress)[: self.config.disable_by_batch_size])
        return [request for request in requests if request in first]

    def _limit(self, request: Request) -> int:
        return min(self._progress[request].acceptance.length, request.max_draft_len)

    def _keep_if_worth(self, request: Request, draft: Draft, least: float) -> None:
        progress = self._progress[request]
        if request.is_structured:  # a grammar follows one path
            draft = draft.first_path()
        # What is being drawn already comes without a draft.
        gain = draft.expected_after(request.num_pending)
        acceptance, adaptive = progress.acceptance, self.config.adaptive
        if not draft.token_ids or (adaptive and not acceptance.allows(gain, least)):
            return
        request.draft, progress.probs = draft.token_ids, draft.probs
        request.draft_parents = draft.parents
        request.keep_allowed_draft()


def build_proposer(config: SpeculativeConfig) -> Proposer:
    """Make the proposer that a user asked for; the only place that reads the method."""
    if config.is_hybrid:
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
