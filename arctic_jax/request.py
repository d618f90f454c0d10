"""What is asked of the engine and what it answers. Vocabulary; host only, no jax.

`SamplingParams` and the outputs are frozen and belong to the user; `Request` is owned by the engine
thread. Names and defaults are vLLM's, so that its users' scripts run with the import changed.
"""

from __future__ import annotations

import enum
import functools
import math
import numbers
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeGuard

from arctic_jax.errors import InvalidRequestError
from arctic_jax.structured_outputs import GrammarMatcher, StructuredOutputsParams

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 128
MAX_LOGIT_BIAS = 1024
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


class RequestOutputKind(enum.Enum):
    """What of a request its user gets."""

    CUMULATIVE = 0
    """After each step everything so far."""
    DELTA = 1
    """After each step what is new."""
    FINAL_ONLY = 2
    """Everything, at the end."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
        n: answers to the same prompt, at most `MAX_N`.
        presence_penalty: subtracted from the logit of a token that was generated before.
        frequency_penalty: subtracted once for each time it was generated before.
        repetition_penalty: divides a positive logit, multiplies a negative one, of a token that
            occurs in the prompt or the output.
        temperature: 0 for greedy decoding, at most 2.
        top_p: keep the most likely tokens up to this probability mass.
        top_k: keep this many of the most likely tokens; 0 or -1 for all.
        min_p: keep tokens at least this likely relative to the most likely one.
        seed: makes the draws of this request reproducible, whatever else is in the batch.
        stop: strings that end the answer; they are cut off unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the answer.
        bad_words: strings that must not be generated.
        ignore_eos: go on past the end-of-sequence token.
        max_tokens: most tokens to generate; `None` for as many as fit.
        min_tokens: tokens before which no end-of-sequence or stop token is produced.
        logprobs: alternatives to report for each generated token; `None` for no log-probabilities.
        prompt_logprobs: the same for each prompt token.
        detokenize: whether text is made; without it `stop` cannot be used.
        skip_special_tokens: leave special tokens out of the text.
        logit_bias: added to the logits of these token ids.
        allowed_token_ids: only these may be generated.
        structured_outputs: the form that the answer has to have.
        output_kind: what of the request is reported, and when.
    """

    # In vLLM's order, for those who pass the first few by position.
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    bad_words: list[str] | tuple[str, ...] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        """Check every range that does not depend on the model.

        Raises:
            InvalidRequestError: with the parameter's name and value.
        """
        if not _is_int(self.n) or self.n < 1:
            _refuse("n", self.n, "must be at least 1")
        if self.n > MAX_N:
            _refuse("n", self.n, f"must be at most {MAX_N}")
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
            self._check_finite(name)
        self._check_finite("repetition_penalty")
        if self.temperature < 0:
            _refuse("temperature", self.temperature, "must be non-negative")
        if self.temperature > 2:
            _refuse("temperature", self.temperature, "must be at most 2")
        if self.n > 1 and self.temperature == 0:
            _refuse("n", self.n, "must be 1 when using greedy sampling")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                _refuse(name, getattr(self, name), "must be in [-2, 2]")
        if self.repetition_penalty <= 0:
            _refuse("repetition_penalty", self.repetition_penalty, "must be greater than zero")
        if not 0 < self.top_p <= 1:
            _refuse("top_p", self.top_p, "must be in (0, 1]")
        if not _is_int(self.top_k) or self.top_k < -1:
            _refuse("top_k", self.top_k, "must be 0 or -1 (all), or at least 1")
        if not 0 <= self.min_p <= 1:
            _refuse("min_p", self.min_p, "must be in [0, 1]")
        if self.max_tokens is not None and (not _is_int(self.max_tokens) or self.max_tokens < 1):
            _refuse("max_tokens", self.max_tokens, "must be at least 1")
        if not _is_int(self.min_tokens) or self.min_tokens < 0:
            _refuse("min_tokens", self.min_tokens, "must be non-negative")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"must be at most max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 0):
                _refuse(name, value, "must be non-negative")
        if self.seed is not None and (
            not _is_int(self.seed) or not -(2**63) <= int(self.seed) < 2**63
        ):
            _refuse("seed", self.seed, "must be a 64-bit integer")
        if not isinstance(self.output_kind, RequestOutputKind):
            _refuse("output_kind", self.output_kind, "must be a RequestOutputKind")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            why = "must be StructuredOutputsParams"
            _refuse("structured_outputs", self.structured_outputs, why)
        if self.structured_outputs and self.ignore_eos:
            _refuse("ignore_eos", self.ignore_eos, "must be false with structured_outputs")
        self._check_lists()

    def _check_finite(self, name: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
            _refuse(name, value, "must be a finite number")

    def _check_lists(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            if name == "stop" and isinstance(value, str):
                continue
            if value is not None and (isinstance(value, str) or not isinstance(value, _LISTS)):
                _refuse(name, value, "must be a list")
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            _refuse("logit_bias", self.logit_bias, "must map token ids to numbers")
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            _refuse("stop", len(stops), f"must hold at most {MAX_STOP_STRINGS} strings")
        if any(not isinstance(s, str) or not s for s in stops):
            _refuse("stop", self.stop, "must hold non-empty strings")
        if stops and not self.detokenize:
            _refuse("stop", self.stop, "needs detokenize=True")
        if len(self.bad_words or ()) > MAX_BAD_WORDS:
            _refuse("bad_words", len(self.bad_words or ()), f"at most {MAX_BAD_WORDS} words")
        if any(not isinstance(w, str) or not w for w in self.bad_words or ()):
            _refuse("bad_words", self.bad_words, "must hold non-empty strings")
        if len(self.logit_bias or {}) > MAX_LOGIT_BIAS:
            _refuse("logit_bias", len(self.logit_bias or {}), f"at most {MAX_LOGIT_BIAS} entries")
        for token, bias in (self.logit_bias or {}).items():
            if not _is_number(bias) or not -100 <= bias <= 100:
                _refuse("logit_bias", {token: bias}, "values must be in [-100, 100]")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            _refuse("allowed_token_ids", self.allowed_token_ids, "must not be empty")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the token ids.

        Raises:
            InvalidRequestError: one is not in the vocabulary; the message holds it.
        """
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                if not _is_int(token) or not 0 <= token < vocab_size:
                    _refuse(name, token, f"is not a token id of a vocabulary of {vocab_size}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @functools.cached_property
    def adjusts_logits(self) -> bool:
        """Whether logits depend on earlier tokens, on lists of tokens, or on a grammar."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words
            or self.min_tokens
            or self.structured_outputs
        )


_LISTS = (Sequence, Set)


def _is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer, numpy's among them; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _refuse(name: str, value: object, why: str) -> None:
    raise InvalidRequestError(f"{name} {why}, got {value!r:.200}.", name, value)


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position; rank 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)  # frozen ones take three times as long to make, here as below
class CompletionOutput:
    """One answer to a prompt: all of it so far, or what is new, see `RequestOutputKind`."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Of all tokens so far, always."""
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    """`stop`, `length`, `abort` or `error`; `None` while it runs."""
    stop_reason: int | str | None = None
    """The stop string or token id; `None` for end-of-sequence."""
    error: str | None = None

    def finished(self) -> bool:
        """Whether this answer has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, `time.monotonic()` seconds."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    """Tokens that a proposer guessed and a step verified ..."""
    num_accepted_tokens: int = 0
    """... and those of them that are in the answer."""
    replica: int = 0
    """Which of several equal engines worked on it."""


@dataclass(slots=True)
class RequestOutput:
    """A request after a step: everything so far, or what is new, see `RequestOutputKind`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """Of `DELTA` those with anything new only; `index` says which they are."""
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """Of `DELTA` in the first output only."""
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None


class RequestStatus(enum.Enum):
    """Where a request is in its life; the values of ended ones are their finish reasons."""

    WAITING = "waiting"
    RUNNING = "running"
    STOPPED = "stop"
    LENGTH = "length"
    ABORTED = "abort"
    FAILED = "error"

    def __init__(self, value: str) -> None:
        """Note whether this is an end."""
        self.finished = value not in ("waiting", "running")


@dataclass(eq=False)
class Request:
    """One sequence in the engine: one of the `n` answers of what the user asked.

    It has no phases: `num_computed_tokens` of `token_ids` are in the cache, and the scheduler lets
    it catch up. Preemption sets `num_computed_tokens` back to 0. The last `num_pending` entries of
    `token_ids` are placeholders: tokens that the device is still drawing, and before them drafted
    ones that it verifies. `draft` is what a proposer thinks comes after the known tokens.
    """

    request_id: str
    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    priority: int = 0
    cache_salt: str | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    matcher: GrammarMatcher | None = None
    """What `params.structured_outputs` asks for, as far as the output has come."""
    arrival_time: float = field(default_factory=time.monotonic)

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_pending: int = 0
    num_verifying: int = 0
    """Of the pending ones those of drafts."""
    draft: Sequence[int] = ()
    draft_parents: Sequence[int] = ()
    """Of a draft that is a tree, see `spec_decode.draft_tree`; empty for a path."""
    runs_ahead: bool = False
    """Whether its next step may begin before it is known how much of a draft was right ..."""
    num_drafted_ahead: int = 0
    """... and how many tokens that step verifies of the next draft, which the device makes."""
    num_published_blocks: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    slot: int = -1
    """Row of the sampler's device state while it runs; -1 otherwise."""
    stop_reason: int | str | None = None
    error: str | None = None
    output_logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None

    def __post_init__(self) -> None:
        """Start the one growing list of all tokens."""
        self.token_ids = self.prompt_token_ids + self.output_token_ids
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)  # nothing predicts the first token

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens."""
        return len(self.prompt_token_ids)

    @property
    def num_drawn(self) -> int:
        """Output tokens, those that are still being drawn included."""
        return len(self.output_token_ids) + self.num_pending

    def expect_tokens(self, count: int = 1, num_drafted: int = 0) -> None:
        """Make room for tokens that the device will draw, after verifying so many of `draft`."""
        if num_drafted:
            self.token_ids.extend(self.draft[:num_drafted] or [0] * num_drafted)
            self.num_verifying += num_drafted
        self.token_ids.extend([0] * count)
        self.num_pending += num_drafted + count
        self.draft = self.draft_parents = ()

    def take_token(self, token: int) -> None:
        """Put a drawn token in the place of the first placeholder."""
        self.output_token_ids.append(token)
        self.token_ids[-self.num_pending] = token
        self.num_pending -= 1

    def known_tail(self, count: int) -> list[int]:
        """Return the last `count` known tokens, or all if there are fewer."""
        known = len(self.token_ids) - self.num_pending
        return self.token_ids[max(known - count, 0) : known]

    def drop_pending(self, count: int) -> None:
        """Take back placeholders for which no token comes: drafts that were wrong.

        Their keys and values are in the cache and will be written over.
        """
        del self.token_ids[len(self.token_ids) - count :]
        self.num_pending -= count
        self.num_computed_tokens = min(self.num_computed_tokens, len(self.token_ids) - 1)

    def keep_allowed_draft(self) -> None:
        """Cut the draft where the grammar does not allow it: it would be verified in vain."""
        if self.matcher is not None and self.draft:
            self.draft = self.draft[: self.matcher.allowed_prefix(self.draft)]

    @property
    def max_draft_len(self) -> int:
        """Most tokens after the known ones that may be drafted, whoever drafts them.

        The step draws one more, and the answer has no room for more than `max_tokens`. What
        `SamplerRows` forbids must be the same for all rows of a step.
        """
        count = len(self.output_token_ids)
        if self.bad_words_ids:
            return 0
        same = self.params.min_tokens if count < self.params.min_tokens else self.max_tokens
        return min(same, self.max_tokens) - count - 1

    @property
    def num_unseen_draft(self) -> int:
        """Tokens that the next step verifies of a draft that the host has not seen."""
        if not (self.num_drafted_ahead and self.num_pending):  # else its draft is known by now
            return 0
        return max(min(self.num_drafted_ahead, self.max_tokens - self.num_drawn - 1), 0)

    @property
    def verifies(self) -> bool:
        """Whether a draft of it is being verified: where its tokens end is not known before."""
        return self.num_verifying > 0

    @property
    def has_draft(self) -> bool:
        """Whether its next step shall verify one."""
        return bool(self.draft) or (self.num_drafted_ahead > 0 and self.num_unseen_draft > 0)

    @property
    def holds_others_up(self) -> bool:
        """Whether it waits for tokens, and others of its kind wait with it."""
        # Who has just begun holds nobody up: or else many that begin in turn hold up all others.
        if self.matcher is not None and 0 < self.num_pending < self.num_drawn:
            return True
        return self.verifies and not self.runs_ahead

    @property
    def waits_for_tokens(self) -> bool:
        """Whether what comes next cannot be computed before the pending tokens are known."""
        if not self.num_pending:
            return False
        if self.needs_host or self.draft or self.all_drawn:
            return True
        return self.verifies and not self.runs_ahead

    @property
    def only_draws(self) -> bool:
        """Whether all its tokens but the last are in the cache, or about to be."""
        return len(self.token_ids) == self.num_computed_tokens + 1

    @property
    def needs_host(self) -> bool:
        """Whether the host has a say in each of its tokens, and so must know the one before."""
        params = self.params
        return bool(self.matcher is not None or params.bad_words or params.min_tokens)

    @property
    def waits_for_masks(self) -> bool:
        """Whether it is still being computed what its grammar allows."""
        return self.matcher is not None and not (self.matcher.ready or self.status.finished)

    @property
    def is_structured(self) -> bool:
        """Whether its tokens follow a grammar: what may come next is the host's to say."""
        return self.matcher is not None

    @property
    def goes_with_others(self) -> bool:
        """Whether it sits every other step out, and so waits for others that do."""
        return bool(self.draft) or self.is_structured

    @property
    def all_drawn(self) -> bool:
        """Whether it has all its tokens, though perhaps not all are known to the host."""
        return len(self.output_token_ids) + self.num_pending >= self.max_tokens

    @property
    def is_streaming(self) -> bool:
        """Whether its answer grows, and its user looks on."""
        if self.params.output_kind is RequestOutputKind.FINAL_ONLY:
            return False
        return self.only_draws and not self.all_drawn

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether prompt positions still need logits for `prompt_logprobs`."""
        if self.params.prompt_logprobs is None:
            return False
        return len(self.prompt_logprobs) < self.num_prompt_tokens
