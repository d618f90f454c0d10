"""The engine: requests in, steps, outputs out. Everything here belongs to one thread.

`EngineCore.step` is the architecture: schedule, launch, accept, release, propose.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from arctic_jax.config import EngineConfig
from arctic_jax.engine import multihost
from arctic_jax.engine.block_pool import BlockPool
from arctic_jax.engine.drafter_files import open_drafter
from arctic_jax.engine.grammar_compiler import GrammarCompiler
from arctic_jax.engine.grammar_masks import PendingMasks
from arctic_jax.engine.grammar_matcher import Grammar
from arctic_jax.engine.output_processor import OutputProcessor, RequestGroup
from arctic_jax.engine.runner import LaunchedStep, ModelRunner
from arctic_jax.engine.scheduler import Scheduler
from arctic_jax.engine.step_log import StepLog
from arctic_jax.errors import EngineDeadError, InvalidRequestError
from arctic_jax.loading.model_files import ModelFiles, open_model
from arctic_jax.models.registry import model_class
from arctic_jax.progress import Report, silent
from arctic_jax.request import Request, RequestOutput, RequestStatus, SamplingParams
from arctic_jax.spec_decode.proposer import build_proposer
from arctic_jax.spec_decode.speculation_stats import SpeculationStats

logger = logging.getLogger(__name__)


class EngineCore:
    """One model on its devices, serving many requests.

    Args:
        config: what the user set.
        report: told how far downloading, loading and compiling are.
        files: an opened model, for those who have one; else `config.load.model` is resolved.
        devices: those to use; `None` for the first ones.
        replica: which of several equal engines this is.

    Raises:
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
        ValueError: the options do not fit the model or the hardware.
    """

    def __init__(
        self,
        config: EngineConfig,
        report: Report = silent,
        files: ModelFiles | None = None,
        devices: Sequence[Any] | None = None,
        replica: int = 0,
    ) -> None:
        _prepare_jax(config)
        multihost.join(config.parallel)
        limits = config.scheduler.limits(jax.default_backend(), config.parallel.num_devices)
        config = replace(config, speculative=config.speculative.on(jax.default_backend()))
        self.files = files or open_model(config.load, report)
        cls = model_class(self.files.config)
        model_config = cls.config_from_hf(self.files.config)
        drafter = open_drafter(config, self.files, model_config, report)
        if drafter is not None and not config.speculative.num_drafted_on_device:
            length = drafter.drafting.num_tokens
            speculative = replace(config.speculative, num_speculative_tokens=length)
            config = replace(config, speculative=speculative)
        self.config = config
        self.runner = ModelRunner(
            config, limits, cls, model_config, self.files.checkpoint, report, devices, drafter
        )
        self.tokenizer = self.files.tokenizer
        self.max_model_len = self.runner.max_model_len
        self.scheduler = Scheduler(
            BlockPool(
                self.runner.num_blocks, config.cache.block_size, config.cache.enable_prefix_caching
            ),
            limits,
            self.runner.max_extra_rows,
            by_priority=config.scheduler.scheduling_policy == "priority",
            num_rounds=self.runner.num_rounds,
        )
        self.proposer = build_proposer(config.speculative)
        self.outputs = OutputProcessor(self.tokenizer, replica)
        self.grammars = GrammarCompiler(
            self.tokenizer,
            model_config.vocab_size,
            self.files.eos_token_ids,
            config.structured_outputs,
        )
        self._masks = PendingMasks(config.structured_outputs)
        self.step_log = StepLog(config.scheduler.step_log, replica)
        self._replica = replica
        self._groups: dict[str, RequestGroup] = {}
        self._group_of: dict[Request, RequestGroup] = {}
        self._num_requests = 0
        self._in_flight: LaunchedStep | None = None
        self.num_steps = 0
        """Calls of `step`: a watchdog sees by it that the engine is alive."""

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        grammar: Grammar | None = None,
        arrival_time: float | None = None,
    ) -> None:
        """Queue a request.

        The grammar of `params.structured_outputs` is compiled here, unless the caller has done it,
        so as not to hold up this thread. `arrival_time` (`time.monotonic()` seconds) is when the
        request was made, if that was before now: what it waited for this thread is part of its
        latency.

        Raises:
            InvalidRequestError: the prompt or a parameter does not fit the model, or the id is in
                use; nothing was queued.
        """
        if request_id in self._groups:
            raise InvalidRequestError(f"request_id {request_id!r} is already in use", "request_id")
        ids = [int(token) for token in prompt_token_ids]
        self.check_request(ids, params)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequestError(f"priority must be an integer, got {priority!r}", "priority")
        if cache_salt is not None and not (isinstance(cache_salt, str) and cache_salt):
            raise InvalidRequestError(
                f"cache_salt must be a non-empty string, got {cache_salt!r:.100}", "cache_salt"
            )
        if params.structured_outputs is not None and grammar is None:
            grammar = self.grammars.compile(params.structured_outputs)
        room = self.max_model_len - len(ids)
        bad_words = tuple(word for w in params.bad_words or () for word in self._spellings(w))
        arrived = time.monotonic() if arrival_time is None else arrival_time
        members = []
        others = replace(params, prompt_logprobs=None)  # the prompt is reported once
        for index in range(params.n):
            self._num_requests += 1
            seed = self._default_seed() if params.seed is None else int(params.seed)
            request = Request(
                request_id=request_id,
                index=index,
                prompt_token_ids=ids,
                params=others if index else params,
                max_tokens=min(params.max_tokens or room, room),
                eos_token_ids=self.files.eos_token_ids,
                seed=(seed + index + 2**63) % 2**64 - 2**63,
                priority=priority,
                cache_salt=cache_salt,
                bad_words_ids=bad_words,
                matcher=None if grammar is None else grammar.matcher(),
                arrival_time=arrived,
            )
            members.append(request)
        group = RequestGroup(request_id, prompt, members)
        self.outputs.open(group)
        self._groups[request_id] = group
        for member in members:
            self._group_of[member] = group
            self.scheduler.add(member)

    def step(self) -> list[RequestOutput]:
        """Launch a step, then take the results of the one before; return what changed.

        So the host works on one step while the device computes the next. What ends with the step
        before is found out after the next was launched with it: that result is discarded. Requests
        with drafts sit every other step out, so that their drafts come after all their tokens.
        Those with a grammar do, too, and more steps if it takes its time.
        """
        self.num_steps += 1
        self._masks.wait()
        changed: dict[RequestGroup, None] = {}
        for request in self._masks.late():
            changed[self._group_of[request]] = None
            self._finish(request, RequestStatus.FAILED)
        scheduled = self.scheduler.schedule(self.proposer.wants_drafts)
        step, self._in_flight = self._in_flight, None
        try:
            if scheduled.requests:
                self._in_flight = self.runner.launch(scheduled)
            if step is None:
                if not scheduled.requests:
                    self._masks.wait_idly()
                return [self._output(group) for group in changed if group.reports]
            output = step.wait()
            batch = step.scheduled
            self.step_log.add(
                step.launched,
                step.layout.name,
                len(batch.requests),
                batch.num_tokens + batch.num_later_tokens,
                batch.num_rows + batch.num_later_tokens,
                step.num_padded_tokens,
            )
        except BaseException as error:
            # Nobody may build on what these requests were about to write.
            self._in_flight = None
            parts = (*scheduled.requests, *(step.scheduled.requests if step else ()))
            for request in {part.request for part in parts if not part.request.status.finished}:
                self._finish(request, RequestStatus.FAILED)
            if isinstance(error, Exception) and (failure := self.runner.failure(seconds=1.0)):
                raise EngineDeadError(failure) from error
            raise
        live = [part for part in batch.requests if not part.request.status.finished]
        changed |= {self._group_of[part.request]: None for part in live if part.samples}
        for request, status in self.outputs.accept(batch, output, self._group_of):
            changed[self._group_of[request]] = None
            self._finish(request, status)
        # Those that were preempted since have lost what would be moved.
        self.runner.keep_accepted(
            p for p in live if p.accepted and p.request.status is RequestStatus.RUNNING
        )
        self.proposer.propose(batch, output)
        for part in live:
            if part.samples and not part.request.status.finished:
                self._masks.begin(part.request)
        return [self._output(group) for group in changed if group.reports]

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; return its last state, or `None` if there is no such request."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for member in group.members:
            if not member.status.finished:
                self._finish(member, RequestStatus.ABORTED)
        return self._output(group)

    @property
    def has_requests(self) -> bool:
        """Whether there is anything to do."""
        return self.scheduler.has_requests

    @property
    def failure(self) -> str | None:
        """Why no step can succeed any more, if that is known; any thread may ask."""
        return self.runner.failure()

    @property
    def cores(self) -> list[EngineCore]:
        """The engines, see `ReplicatedEngine`; here this one."""
        return [self]

    @property
    def step_logs(self) -> list[StepLog]:
        """One an engine; here one."""
        return [self.step_log]

    @property
    def speculation_stats(self) -> list[SpeculationStats]:
        """What came of drafts: one an engine; here one."""
        return [self.proposer.stats]

    def reset_prefix_cache(self) -> None:
        """Forget the cached prefixes."""
        self.scheduler.pool.reset_prefix_cache()

    def check(self) -> None:
        """Check that no block is leaked.

        Raises:
            RuntimeError: see `BlockPool.check`.
        """
        self.scheduler.pool.check(self.scheduler.held_blocks())

    def default_sampling_params(self) -> SamplingParams:
        """Return the model's own defaults, from its `generation_config.json`."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
        given = {n: v for n in names if (v := self.files.generation_config.get(n)) is not None}
        if "max_new_tokens" in given:
            given["max_tokens"] = given.pop("max_new_tokens")
        if self.files.generation_config.get("do_sample") is False:
            given["temperature"] = 0.0
        return replace(SamplingParams(), **given)

    def _finish(self, request: Request, status: RequestStatus) -> None:
        self.scheduler.finish(request, status)
        self.outputs.totals.end(request)
        self.runner.forget(request)
        self.proposer.finish(request)
        if request.matcher is not None:
            request.matcher.cancel()
        self._group_of.pop(request).num_open -= 1

    def _output(self, group: RequestGroup) -> RequestOutput:
        if group.finished:
            self._groups.pop(group.request_id, None)
        return self.outputs.output(group)

    def check_request(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Check a prompt and its parameters against the model; any thread may call.

        Raises:
            InvalidRequestError: the engine would not take them.
        """
        vocab_size = self.runner.model_config.vocab_size
        if not ids:
            raise InvalidRequestError("the prompt must not be empty", "prompt")
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"token id {wrong} is not in the vocabulary of {vocab_size}", "prompt"
            )
        if len(ids) >= self.max_model_len:
            raise InvalidRequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"your prompt contains {len(ids)} input tokens and leaves no room for an output "
                "token. Please reduce the length of the input prompt.",
                "input_tokens",
            )
        if params.prompt_logprobs is not None and not self.runner.max_prompt_rows:
            raise InvalidRequestError(
                f"prompt_logprobs is not available for {self.runner.model_config.architecture}: "
                "prompt tokens do not pass through its upper layers (SwiftKV)",
                "prompt_logprobs",
            )
        params.check_vocabulary(vocab_size)
        most = self.config.scheduler.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name) or 0
            if value > most:
                raise InvalidRequestError(f"{name} must be at most {most}, got {value}.", name)

    def _default_seed(self) -> int:
        return self.config.load.seed * 1_000_003 + (self._replica << 40) + self._num_requests

    def _spellings(self, word: str) -> list[tuple[int, ...]]:
        """Token sequences of a bad word, at the start of a text and after a space."""
        plain = self.tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = self.tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        return [tuple(ids) for ids in (plain, spaced) if ids]


def _prepare_jax(config: EngineConfig) -> None:
    """Set what JAX has for the whole process, unless the user has set it."""
    # Only heeded if no GPU program has run yet in this process; JAX's default is 0.75.
    share = str(config.cache.gpu_memory_utilization)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
