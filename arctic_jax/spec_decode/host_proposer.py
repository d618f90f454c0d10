"""When a draft is made, and whether it is worth its step. Host only; owned by the engine thread.

What is drafted is the business of the subclasses. With `adaptive` there are four rules:

- A draft is made if it promises more tokens than it costs. What it promises is the drafter's own
  estimate times how true that was of late (`Acceptance`). What it costs is measured (`DraftCosts`).
- What a draft that was not made would have brought is seen when its place in the answer is reached.
  So a request whose drafts are no good is found out, and one whose drafts have become good, without
  a step.
- No request loses more than a small share of its tokens, whatever was promised
  (`Acceptance.balance`).
- What has not shown that it pays gets a small share of the time (`Allowance`): looking for drafts,
  drafts that measure their cost, and the waiting of those that do not draft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arctic_jax.request import Request, RequestStatus
from arctic_jax.scheduled_batch import ScheduledBatch, ScheduledRequest
from arctic_jax.spec_decode import draft_tree
from arctic_jax.spec_decode.acceptance import Acceptance, Trust
from arctic_jax.spec_decode.allowance import Allowance
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.draft_costs import DraftCosts
from arctic_jax.spec_decode.speculation_stats import SpeculationStats
from arctic_jax.speculative_config import SpeculativeConfig

if TYPE_CHECKING:  # it imports jax, which this package does without
    from arctic_jax.batch import HostOutput

_TO_BEGIN = 2  # portions that a request launched ahead waits for, see `DraftCosts`
_ALL = 0.98  # weight of older drafts in the trust of all requests
_OF_GAINS = 0.1, 0.3, 0.5  # for looks, for steps with drafts, and for drafting on the device
_MOST_SPENT = 2.0  # steps, for one that drafts on the device: a stall is no cost of drafts
_NEW = 0.1  # of the last drafts in how long it takes to make one


@dataclass
class _Progress:
    """What is known of one request.

    Attributes:
        acceptance: what its drafts are worth.
        is_started: whether its prompt was told.
        num_observed: how many output tokens were.
        guess: a draft that is neither verified nor compared with what came yet ...
        guessed_at: ... after how many output tokens it was made ...
        cost: ... and what it would have cost, if only the balance was against it; else 0.
    """

    acceptance: Acceptance
    is_started: bool = False
    num_observed: int = 0
    guess: Draft | None = None
    guessed_at: int = 0
    cost: float = 0.0

    def remember(self, guess: Draft, at: int, cost: float = 0.0) -> None:
        self.guess, self.guessed_at, self.cost = guess, at, cost


class HostProposer:
    """Decides on the host which drafts there shall be; its subclasses say what they are.

    Args:
        config: lengths, cut-offs, and whether drafts follow their success.
    """

    wants_drafts = False

    def __init__(self, config: SpeculativeConfig) -> None:
        self.config = config
        self.stats = SpeculationStats.zeros(config.max_draft_len)
        self.costs = DraftCosts()
        self._progress: dict[Request, _Progress] = {}  # in the order of their first steps
        self._trust = Trust()  # in the drafts of all requests
        self._for_looks, self._for_steps = Allowance(_OF_GAINS[0]), Allowance(_OF_GAINS[1])
        # The deeper debt: two more steps draft until it is known what the first one's drafts cost.
        self._for_drafting = Allowance(_OF_GAINS[2], most_debt=4.0)
        self._seconds_to_look = 0.0  # for one request's draft, of late
        self._turn = 0

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

    def remember(self, request: Request) -> None:
        """Keep for others the answer to a request that was never started."""

    def propose(self, scheduled: ScheduledBatch, output: HostOutput) -> None:
        """See `Proposer`."""
        looking, idle = [], []
        num_sampled = num_drafts = num_accepted = 0
        for part in scheduled.requests:
            request = part.request
            if part.num_drafted:
                num_drafts += 1
                num_accepted += part.num_accepted
                for index, accepted in enumerate(part.accepted_of_rounds):
                    self._verified(part, index, accepted)
            if request.status.finished or not request.output_token_ids:
                continue
            num_sampled += part.samples
            progress = self._progress.get(request)
            if progress is None:
                acceptance = Acceptance(self.config.max_draft_len)
                progress = self._progress[request] = _Progress(acceptance)
            if request.status is not RequestStatus.RUNNING:
                continue
            hopes = progress.is_started and progress.acceptance.patience > 0
            drafts = request.draft or request.num_drafted_ahead
            (looking if drafts or hopes else idle).append(request)
        if self.config.adaptive:
            self._account(scheduled, num_sampled, num_drafts, num_accepted)
            idle = self._in_turn(idle)
        if looking or idle:
            self._look([*looking, *idle])

    def finish(self, request: Request) -> None:
        """See `Proposer`."""
        progress = self._progress.get(request)
        if progress is None:
            return
        if progress.is_started:
            self._follow([request])
            self.stop(request)
        else:
            self.remember(request)
        del self._progress[request]
        if not self._progress:
            self.costs.pause()

    @property
    def hard_disabled(self) -> bool:
        """Whether there are so many requests that nobody drafts."""
        hard = self.config.hard_disable_by_batch_size
        return hard is not None and len(self._progress) >= hard

    # --- what came of drafts

    def guess_of(self, request: Request, index: int) -> Draft | None:
        """Return what a later round of a step verified, for those whose drafts the device makes."""
        del request, index

    def _verified(self, part: ScheduledRequest, index: int, accepted: int) -> None:
        """Learn from a draft that a round of a step verified."""
        progress, drafted = self._progress.get(part.request), part.num_drafted
        guess = progress.guess if progress is not None else None
        guess = self.guess_of(part.request, index) if index else guess
        if part.unseen and guess is not None:
            drafted = min(drafted, len(guess.token_ids))  # it was shorter than supposed
        self.stats.add(drafted, accepted, part.parents)
        part.request.num_drafted_tokens += drafted
        part.request.num_accepted_tokens += accepted
        if progress is None or guess is None or not self.config.adaptive:
            return
        probs = guess.probs[:drafted]
        needed = accepted
        if part.parents:
            needed = draft_tree.num_needed(part.parents, probs, part.accepted)
        progress.guess = None
        cost = self.costs.of_portion(len(self._progress))
        progress.acceptance.book(accepted - cost)
        self._learn(progress, drafted, sum(probs), accepted, needed)

    def _compare(self, request: Request, progress: _Progress) -> None:
        """Learn from a draft that was not verified, once it is known how much of it came."""
        if progress.guess is None:
            return
        guess, at = progress.guess.first_path(), progress.guessed_at
        length = len(guess.token_ids)
        came = request.output_token_ids[at : at + length]
        pairs = enumerate(zip(guess.token_ids, came, strict=False))
        right = next((i for i, (drafted, token) in pairs if drafted != token), len(came))
        if right == len(came) < length:
            return  # all right so far
        progress.guess = None
        self._learn(progress, length, sum(guess.probs), right, right)
        if progress.cost:
            progress.acceptance.book_missed(right - progress.cost)

    def _learn(
        self, progress: _Progress, drafted: int, expected: float, accepted: int, needed: int
    ) -> None:
        progress.acceptance.learn(drafted, expected, accepted, needed)
        self._trust.add(accepted, expected, _ALL)

    def _account(
        self, scheduled: ScheduledBatch, num_sampled: int, num_drafts: int, num_accepted: int
    ) -> None:
        """Take a step's time to the accounts."""
        num_requests = max(len(self._progress), 1)
        mixed = scheduled.num_tokens - scheduled.num_drafted > len(scheduled.requests)
        rounds = scheduled.num_rounds
        longer = self.costs.took(
            num_requests, num_sampled, num_drafts, mixed, scheduled.drafts, rounds
        )
        steps = rounds * longer
        gained, drafting = num_accepted / num_requests, min(num_drafts / num_requests, 1.0)
        self._for_looks.earn(steps, gained)
        # What few have gained does not pay for the waiting of many.
        self._for_steps.earn(steps, gained * drafting)
        if num_drafts:
            self._for_steps.spend(max(steps - rounds, 0.0) * (1 - drafting))
        self._for_drafting.earn(steps, gained)
        if scheduled.drafts:
            self._for_drafting.spend(min(steps - rounds, _MOST_SPENT))

    # --- whose drafts there are

    def _in_turn(self, idle: Sequence[Request]) -> list[Request]:
        """Return those of the requests without much hope that may look for a draft this time."""
        if not idle or self._for_looks.steps <= 0:
            return []
        plain = self.costs.plain(len(self._progress))
        each = self._seconds_to_look / plain if plain else 0.0
        count = 1 + int(self._for_looks.steps / each) if each else len(idle)
        begin = self._turn % len(idle)
        self._turn += count
        return [*idle[begin:], *idle[:begin]][:count]

    def _look(self, requests: Sequence[Request]) -> None:
        """Look for drafts for requests, and take away those that they have."""
        waited = {request for request in requests if request.draft}
        for request in requests:
            request.draft = request.draft_parents = ()
            request.num_drafted_ahead = 0
        requests = self._within_cut_offs(requests)
        if not requests:
            return
        begin = self.costs.clock()
        self._follow(requests)
        limits = {r: limit for r in requests if (limit := self._limit(r)) > 0}
        drafts = self.drafts(list(limits), list(limits.values()))
        found = dict(zip(limits, drafts, strict=True))
        if not self.config.adaptive:
            for request, draft in found.items():
                self._make(request, draft)
            return
        num_requests = len(self._progress)
        if plain := self.costs.plain(num_requests):
            seconds = self.costs.clock() - begin
            self._for_looks.spend(seconds / plain)
            self._seconds_to_look += _NEW * (seconds / len(requests) - self._seconds_to_look)
            # Not before that is known: drafts are compared with it.
            self._make_those_worth(found, waited)

    def _follow(self, requests: Sequence[Request]) -> None:
        """Catch up with what requests have said."""
        new = {}
        for request in requests:
            progress, output = self._progress[request], request.output_token_ids
            if not progress.is_started:
                progress.is_started = True
                self.start(request)
            if progress.num_observed < len(output):
                new[request] = output[progress.num_observed :]
                progress.num_observed = len(output)
                if self.config.adaptive:
                    progress.acceptance.earn(len(new[request]))
                    self._compare(request, progress)
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

    # --- what is worth its step

    def _make_those_worth(self, found: Mapping[Request, Draft], waited: set[Request]) -> None:
        """Make the drafts that promise to pay; if there are none, perhaps one to learn its cost."""
        num_requests = len(self._progress)
        of_portion, trust = self.costs.of_portion(num_requests), self._trust.value()
        can_lose = self._for_steps.steps * num_requests
        most_lost = 0.0 if self.costs.known(num_requests) else can_lose
        made, trial = [], None
        for request, draft in found.items():
            acceptance = self._progress[request].acceptance
            waits_for = 0 if draft.on_device else request.num_pending
            cost = of_portion * (_TO_BEGIN if waits_for else 1)
            # What is being drawn already comes without a draft.
            gain = draft.expected_after(waits_for) * acceptance.trust.value(trust)
            allowed = acceptance.balance > 0 and can_lose > 0
            acceptance.has_found(gain >= cost)
            if gain >= cost and (allowed or request in waited):
                made.append(request)
                continue
            if (self._progress[request].guess is None or request.verifies) and draft.token_ids:
                missed = cost + waits_for if gain >= cost else 0.0
                at = len(request.output_token_ids)
                self._progress[request].remember(draft, at, missed)
            if allowed and cost / 2 < gain and 0 < cost - gain < most_lost:
                trial, most_lost = request, cost - gain
        if trial is not None and not made:
            self._for_steps.spend(most_lost / num_requests)
            made.append(trial)
        for request in made:
            self._make(request, found[request])
        begun = [request for request in made if request.draft and request.num_pending]
        for request in begun:
            self._progress[request].acceptance.book(-of_portion)
        self.costs.made(num_requests, len(made), len(begun))

    def _make(self, request: Request, draft: Draft) -> None:
        if request.is_structured:  # a grammar follows one path
            draft = draft.first_path()
        if not draft.token_ids:
            return
        self._progress[request].remember(draft, len(request.output_token_ids))
        request.draft, request.draft_parents = draft.token_ids, draft.parents
        request.keep_allowed_draft()
