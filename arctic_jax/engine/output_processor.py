"""From a step's tokens to what the user sees: texts, log-probabilities, ends. Host only, no jax.

Owned by the engine thread. One `RequestGroup` is what a user asked for; its members are the `n`
requests that the scheduler knows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from arctic_jax.batch import HostOutput
from arctic_jax.engine.detokenizer import TextStream
from arctic_jax.engine.request_totals import RequestTotals
from arctic_jax.loading.tokenizer import Tokenizer
from arctic_jax.request import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    RequestStatus,
)
from arctic_jax.scheduled_batch import ScheduledBatch, ScheduledRequest


@dataclass(eq=False)
class RequestGroup:
    """The answers to one prompt."""

    request_id: str
    prompt: str | None
    members: list[Request]
    streams: dict[Request, TextStream] = field(default_factory=dict)
    num_reported: dict[Request, int] = field(default_factory=dict)
    """Tokens of each answer that its user has; kept for `DELTA` only."""
    ends_reported: set[Request] = field(default_factory=set)
    num_open: int = field(init=False)
    """Answers that have not ended."""

    def __post_init__(self) -> None:
        """Note what its user gets."""
        self.kind = self.members[0].params.output_kind
        self.num_open = len(self.members)

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return not self.num_open

    @property
    def reports(self) -> bool:
        """Whether its user gets the state after this step."""
        if self.kind is RequestOutputKind.FINAL_ONLY:
            return self.finished
        # The prompt's log-probabilities come with the first output, so all of them must be there.
        return not self.members[0].wants_prompt_rows or self.finished


class OutputProcessor:
    """Takes each step's output onto its requests and makes `RequestOutput`s.

    Args:
        tokenizer: of the model.
        replica: which of several equal engines this is.
    """

    def __init__(self, tokenizer: Tokenizer, replica: int = 0) -> None:
        self.tokenizer = tokenizer
        self.totals = RequestTotals()
        self._replica = replica

    def open(self, group: RequestGroup) -> None:
        """Start the texts of a new group."""
        for member in group.members:
            params = member.params
            if params.detokenize:
                group.streams[member] = TextStream(
                    self.tokenizer.backend,
                    member.prompt_token_ids,
                    params.stop_strings,
                    params.include_stop_str_in_output,
                    params.skip_special_tokens,
                )

    def accept(
        self, scheduled: ScheduledBatch, output: HostOutput, groups: dict[Request, RequestGroup]
    ) -> list[tuple[Request, RequestStatus]]:
        """Take a step's rows onto its requests; return those that end, and how.

        What goes wrong with one request ends that one as `FAILED`.
        """
        ended = []
        row, now = 0, time.monotonic()
        for part in scheduled.requests:
            request, first, row = part.request, row, row + part.num_rows
            if request.status.finished:  # its end was seen after this step was launched
                continue
            try:
                status = None
                if num_prompt_rows := part.num_rows - part.num_draws:
                    rows = range(first, first := first + num_prompt_rows)
                    status = self._accept_prompt_rows(part, rows, output)
                begins = [first + i * output.stride for i in range(part.num_rounds)]
                if status is None:
                    status = self._take_draws(part, begins, output, groups[request], now)
            except Exception as error:  # one request must not take the others with it
                request.error = f"{type(error).__name__}: {error}"
                status = RequestStatus.FAILED
            if status is not None:
                ended.append((request, status))
        return ended

    def _accept_prompt_rows(
        self, part: ScheduledRequest, rows: range, output: HostOutput
    ) -> RequestStatus | None:
        request, first_position = part.request, part.end - part.num_rows
        for position, row in enumerate(rows, first_position):
            if not output.finite[row]:
                return self._fail(request, position)
        if request.wants_prompt_rows:
            for position, row in enumerate(rows, first_position + 1):
                token = request.prompt_token_ids[position]
                wanted = request.params.prompt_logprobs or 0
                request.prompt_logprobs.append(self._logprobs(output, row, token, wanted))
        return None

    def _take_draws(
        self,
        part: ScheduledRequest,
        begins: Sequence[int],
        output: HostOutput,
        group: RequestGroup,
        now: float,
    ) -> RequestStatus | None:
        """Append the tokens of each round: accepted drafts and one more, up to an end."""
        request, status, accepted = part.request, None, []
        for begin in begins:
            # Rows without a token follow wrong drafts.
            rows = [i for i in range(begin, begin + part.num_draws) if output.token_ids[i] >= 0]
            known = len(request.output_token_ids)
            for row in rows:
                if output.finite[row]:
                    status = self._take_token(request, row, output, group, now)
                else:  # what comes after an end may be as it likes
                    status = self._fail(request, request.num_tokens - request.num_pending - 1)
                if status is not None:
                    break
            accepted.append(max(len(request.output_token_ids) - known - 1, 0))
            if part.parents:  # the rows of drafted tokens come after that of the last known one
                part.accepted = [row - rows[0] - 1 for row in rows[1 : 1 + accepted[-1]]]
            if status is not None:
                break
        if part.num_drafted:
            part.accepted_of_rounds = accepted
            drafted = part.num_rounds * part.num_drafted
            request.num_verifying -= drafted
            request.drop_pending(drafted - part.num_accepted)
        return status

    def _fail(self, request: Request, position: int) -> RequestStatus:
        request.error = (
            f"the logits at position {position} are not finite numbers, or the request's "
            "parameters allow no token there"
        )
        return RequestStatus.FAILED

    def _take_token(
        self, request: Request, row: int, output: HostOutput, group: RequestGroup, now: float
    ) -> RequestStatus | None:
        """Append a row's token; return how the request ends, if it does."""
        params, token = request.params, output.token_ids[row]
        if request.first_token_time is None:
            request.first_token_time = now
            self.totals.begin(request)
        request.last_token_time = now
        request.take_token(token)
        complete = request.matcher is not None and request.matcher.accept(token)
        self.totals.generated_tokens += 1
        if params.logprobs is not None:
            request.cumulative_logprob += float(output.logprob[row])
            alternatives = self._logprobs(output, row, token, params.logprobs)
            request.output_logprobs.append(alternatives)

        may_stop = len(request.output_token_ids) >= params.min_tokens
        status = None
        if may_stop and token in request.eos_token_ids and not params.ignore_eos:
            status = RequestStatus.STOPPED
        elif may_stop and token in (params.stop_token_ids or ()):
            status, request.stop_reason = RequestStatus.STOPPED, token
        stream = group.streams.get(request)
        if stream is not None and (status is None or params.include_stop_str_in_output):
            stop = stream.push(token, may_stop and status is None)
            if stop is not None:
                status, request.stop_reason = RequestStatus.STOPPED, stop
        if status is None and complete:
            status = RequestStatus.STOPPED
        if status is None and len(request.output_token_ids) >= request.max_tokens:
            status = RequestStatus.LENGTH
        if stream is not None and (status is not None or group.reports):
            stream.flush()  # here an error ends this request only
        return status

    def _logprobs(self, output: HostOutput, row: int, token: int, wanted: int) -> PositionLogprobs:
        """Log-probabilities of one position: the `wanted` likeliest tokens, and `token`."""
        ids = [int(i) for i in output.top_token_ids[row][:wanted]]
        values = output.top_logprobs[row][:wanted]
        entries = {
            i: (float(v), rank + 1) for rank, (i, v) in enumerate(zip(ids, values, strict=True))
        }
        entries = {token: (float(output.logprob[row]), int(output.rank[row]))} | entries
        return {
            i: Logprob(value, rank, self.tokenizer.decode([i], skip_special_tokens=False))
            for i, (value, rank) in entries.items()
        }

    def output(self, group: RequestGroup) -> RequestOutput:
        """Make what a group's user gets after a step."""
        first, finished = group.members[0], group.finished
        wanted = first.params.prompt_logprobs is not None
        if group.kind is RequestOutputKind.DELTA:
            wanted = wanted and not group.num_reported
            answers = [delta for m in group.members if (delta := self._delta(m, group))]
        else:
            answers = [self._completion(member, group) for member in group.members]
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=answers,
            finished=finished,
            prompt_logprobs=list(first.prompt_logprobs) if wanted else None,
            num_cached_tokens=first.num_cached_tokens,
            metrics=self._metrics(group),
        )

    def _metrics(self, group: RequestGroup) -> RequestMetrics:
        first = group.members[0]
        metrics = RequestMetrics(
            arrival_time=first.arrival_time,
            first_scheduled_time=first.first_scheduled_time,
            first_token_time=first.first_token_time,
            last_token_time=first.last_token_time,
            finished_time=time.monotonic() if group.finished else None,
            replica=self._replica,
        )
        for member in group.members:
            metrics.num_preemptions += member.num_preemptions
            metrics.num_drafted_tokens += member.num_drafted_tokens
            metrics.num_accepted_tokens += member.num_accepted_tokens
        return metrics

    def _completion(self, request: Request, group: RequestGroup) -> CompletionOutput:
        stream = group.streams.get(request)
        text = ""
        if stream is not None:
            stream.flush()
            text = stream.text if request.status.finished else stream.visible
        return _answer(request, text, 0)

    def _delta(self, request: Request, group: RequestGroup) -> CompletionOutput | None:
        """What is new of an answer since the last call; `None` for nothing."""
        known, ended = group.num_reported.get(request, 0), request.status.finished
        if request in group.ends_reported or not (ended or len(request.output_token_ids) > known):
            return None
        group.num_reported[request] = len(request.output_token_ids)
        if ended:
            group.ends_reported.add(request)
        stream = group.streams.get(request)
        text = ""
        if stream is not None:
            stream.flush()
            text = stream.take(ended)
        return _answer(request, text, known)


def _answer(request: Request, text: str, first: int) -> CompletionOutput:
    """An answer with this text and its tokens from the given one on."""
    wanted = request.params.logprobs is not None
    return CompletionOutput(
        index=request.index,
        text=text,
        token_ids=request.output_token_ids[first:],
        cumulative_logprob=request.cumulative_logprob if wanted else None,
        logprobs=request.output_logprobs[first:] if wanted else None,
        finish_reason=request.status.value if request.status.finished else None,
        stop_reason=request.stop_reason,
        error=request.error,
    )


def join_deltas(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Make one output of several `DELTA`s of a request that follow one another, at least one."""
    if len(outputs) == 1:
        return outputs[0]
    parts: dict[int, list[CompletionOutput]] = {}
    for output in outputs:
        for answer in output.outputs:
            parts.setdefault(answer.index, []).append(answer)
    return replace(
        outputs[-1],
        outputs=[_join_answers(parts[index]) for index in sorted(parts)],
        prompt_logprobs=outputs[0].prompt_logprobs,
    )


def _join_answers(parts: Sequence[CompletionOutput]) -> CompletionOutput:
    logprobs = None
    if parts[-1].logprobs is not None:
        logprobs = [position for part in parts for position in part.logprobs or ()]
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=logprobs,
    )
