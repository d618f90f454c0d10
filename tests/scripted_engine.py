"""An engine without a model: answers and the times of steps are given, all else is the real thing.

The scheduler, the requests and the proposer are the engine's, in the order of `EngineCore.step`;
the device is a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from arctic_jax.batch import HostOutput
from arctic_jax.config import StepLimits
from arctic_jax.engine.block_pool import BlockPool
from arctic_jax.engine.scheduler import Scheduler
from arctic_jax.request import Request, RequestStatus, SamplingParams
from arctic_jax.scheduled_batch import ScheduledBatch, ScheduledRequest
from arctic_jax.spec_decode.draft_costs import DraftCosts
from arctic_jax.spec_decode.host_proposer import HostProposer
from arctic_jax.spec_decode.proposer import build_proposer
from arctic_jax.speculative_config import SpeculativeConfig

Job = tuple[Sequence[int], Sequence[int]]
"""A prompt and its answer."""
_EMPTY = np.zeros((0, 0))


@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        host: to launch a step and take its results.
        plain: of a step without drafts, on the device.
        verify: of one with drafts.
        look: of the host, to look for one request's draft.
        draft: more, of a step that drafts on the device.
    """

    host: float
    plain: float
    verify: float
    look: float = 0.0
    draft: float = 0.0


@dataclass
class ScriptedEngine:
    """Runs requests to their given ends.

    Attributes:
        times: of steps.
        config: of speculation.
        num_right: of a drafter on the device, how many tokens of each draft are right.
        num_rounds: of a step, see `engine/rounds.py`.
    """

    times: Times
    config: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    num_right: int = 0
    num_rounds: int = 1

    def __post_init__(self) -> None:
        self.now = self.busy_until = 0.0
        self.num_tokens = self.num_steps = self.num_drafts = 0
        self._drafts = False  # whether the step that was launched last does
        self.scheduler = Scheduler(
            BlockPool(10_000, 16, False),
            StepLimits(64, 4096, 4096),
            max_extra_rows=256,
            num_rounds=self.num_rounds,
        )
        self.proposer = build_proposer(self.config)
        self.answers: dict[Request, Sequence[int]] = {}
        if isinstance(self.proposer, HostProposer):
            self.proposer.costs = DraftCosts(lambda: self.now)
            drafts = self.proposer.drafts
            self.proposer.drafts = lambda requests, limits: self._timed(drafts(requests, limits))

    def run(self, jobs: Sequence[Job], concurrency: int) -> float:
        """Return tokens a second."""
        waiting, in_flight = list(jobs)[::-1], None
        while waiting or self.scheduler.has_requests:
            while waiting and self.scheduler.num_requests < concurrency:
                self._add(*waiting.pop())
            scheduled = self.scheduler.schedule(self.proposer.wants_drafts)
            step, in_flight = in_flight, None
            if scheduled.requests:
                in_flight = scheduled, self._launch(scheduled)
            if step is not None:
                self._accept(*step)
        return self.num_tokens / self.now

    def _add(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        params = SamplingParams(ignore_eos=True)
        request = Request("r", 0, list(prompt), params, max_tokens=len(answer))
        self.answers[request] = answer
        self.scheduler.add(request)

    def _launch(self, scheduled: ScheduledBatch) -> float:
        """Return when the results are there."""
        self.now += self.times.host / 2
        assert self._drafts or not any(part.unseen for part in scheduled.requests)
        self._drafts = scheduled.drafts
        seconds = self.times.verify if scheduled.num_drafted else self.times.plain
        seconds += self.times.draft * scheduled.drafts
        seconds *= scheduled.num_rounds
        self.busy_until = max(self.busy_until, self.now) + seconds
        self.num_steps += scheduled.num_rounds
        verified = sum(part.num_drafted > 0 for part in scheduled.requests)
        self.num_drafts += verified * scheduled.num_rounds
        return self.busy_until

    def _accept(self, scheduled: ScheduledBatch, ready: float) -> None:
        self.now = max(self.now, ready) + self.times.host / 2
        drafts = []
        for index in range(scheduled.num_rounds):
            for part in scheduled.requests:
                if part.samples and not part.request.status.finished and index < part.num_rounds:
                    self._take(part, index)
            drafts += [self._device_draft(part.request) for part in scheduled.requests]
        made = np.array(drafts) if scheduled.drafts else _EMPTY
        stride = len(scheduled.requests)
        output = HostOutput([], [], _EMPTY, _EMPTY, _EMPTY, _EMPTY, made, stride)
        self.proposer.propose(scheduled, output)

    def _take(self, part: ScheduledRequest, index: int) -> None:
        request, answer = part.request, self.answers[part.request]
        known = len(request.output_token_ids)
        drafted = request.token_ids[part.end - part.num_drafted : part.end]
        if part.unseen:  # the round before made it
            drafted = self._device_draft(request)[: part.num_drafted]
        right = answer[known : known + part.num_drafted]
        pairs = enumerate(zip(drafted, right, strict=False))
        count = next((i for i, (a, b) in pairs if a != b), len(right))
        for token in answer[known : known + count + 1]:
            request.take_token(token)
            self.num_tokens += 1
        if part.num_drafted:
            accepted = len(request.output_token_ids) - known - 1
            part.accepted_of_rounds = [*part.accepted_of_rounds, accepted]
            request.num_verifying -= part.num_drafted
            request.drop_pending(part.num_drafted - accepted)
        if len(request.output_token_ids) == len(answer):
            self.scheduler.finish(request, RequestStatus.LENGTH)
            self.proposer.finish(request)

    def _device_draft(self, request: Request) -> list[int]:
        length, known = self.config.max_draft_len, len(request.output_token_ids)
        right = list(self.answers[request][known : known + self.num_right])
        return right + [-1] * (length - len(right))

    def _timed[T: Sequence[object]](self, found: T) -> T:
        self.now += self.times.look * len(found)
        return found
