"""Data parallelism: several engines on devices of their own behind the interface of one.

Every engine steps in a thread of its own, so that a long step of one does not hold up the others.
An engine belongs to whoever holds its lock: its thread while it steps, else the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax

from arctic_jax.config import EngineConfig
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.grammar_compiler import GrammarCompiler
from arctic_jax.engine.grammar_matcher import Grammar
from arctic_jax.engine.step_log import StepLog
from arctic_jax.loading.model_files import ModelFiles, open_model
from arctic_jax.progress import Report, silent
from arctic_jax.request import RequestOutput, SamplingParams
from arctic_jax.spec_decode.speculation_stats import SpeculationStats


class ReplicatedEngine:
    """`EngineCore`s with one model; a new request goes to the one with the fewest.

    Args:
        config: what the user set; `data_parallel_size` engines are made.
        report: told how far downloading, loading and compiling are.
        files: an opened model, for those who have one; else `config.load.model` is resolved.

    Raises:
        ValueError: there are fewer devices than the engines need; the message holds the numbers.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
    """

    def __init__(
        self, config: EngineConfig, report: Report = silent, files: ModelFiles | None = None
    ) -> None:
        count, each = config.parallel.data_parallel_size, config.parallel.num_devices
        devices = jax.devices()
        if len(devices) < count * each:
            raise ValueError(
                f"data_parallel_size={count} engines of {each} devices need {count * each}, "
                f"there are {len(devices)}"
            )
        self.config = config
        self.files = files or open_model(config.load, report)
        self.engines = [
            EngineCore(config, report, self.files, devices[i * each : (i + 1) * each], replica=i)
            for i in range(count)
        ]
        self.tokenizer = self.files.tokenizer
        self.max_model_len = self.engines[0].max_model_len
        self._locks = [threading.Lock() for _ in self.engines]
        self._engine_of: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="arctic-jax-replica")
        self._stepping: dict[int, Future[list[RequestOutput]]] = {}

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
        """Queue a request, see `EngineCore.add_request`."""
        if params.structured_outputs is not None and grammar is None:
            grammar = self.grammars.compile(params.structured_outputs)
        loads = [engine.scheduler.num_requests for engine in self.engines]
        # An id in use goes where it is in use, and is refused there.
        least = self._engine_of.get(request_id, loads.index(min(loads)))
        with self._locks[least]:
            self.engines[least].add_request(
                request_id,
                prompt_token_ids,
                params,
                prompt,
                priority,
                cache_salt,
                grammar,
                arrival_time,
            )
        self._engine_of[request_id] = least

    def step(self) -> list[RequestOutput]:
        """Let every engine that has requests step; return what changed as soon as something has.

        An error of one comes when nothing that others brought is left to be returned.
        """
        for i, engine in enumerate(self.engines):
            if i not in self._stepping and engine.has_requests:
                self._stepping[i] = self._threads.submit(self._step, i)
        wait(self._stepping.values(), return_when=FIRST_COMPLETED)
        done = [i for i, stepping in self._stepping.items() if stepping.done()]
        fine = [i for i in done if self._stepping[i].exception() is None]
        outputs: list[RequestOutput] = []
        for i in fine or done[:1]:
            outputs += self._stepping.pop(i).result()
        for output in outputs:
            if output.finished:
                self._engine_of.pop(output.request_id, None)
        return outputs

    def check_request(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Check a prompt and its parameters, see `EngineCore.check_request`."""
        self.engines[0].check_request(ids, params)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; return its last state, or `None` if there is no such request."""
        i = self._engine_of.pop(request_id, None)
        if i is None:
            return None
        with self._locks[i]:
            return self.engines[i].abort(request_id)

    @property
    def has_requests(self) -> bool:
        """Whether there is anything to do; what steps have brought since the last call is, too."""
        return bool(self._stepping) or any(engine.has_requests for engine in self.engines)

    @property
    def cores(self) -> list[EngineCore]:
        """The engines."""
        return self.engines

    @property
    def grammars(self) -> GrammarCompiler:
        """Compiles for all engines."""
        return self.engines[0].grammars

    @property
    def step_logs(self) -> list[StepLog]:
        """One an engine."""
        return [engine.step_log for engine in self.engines]

    @property
    def speculation_stats(self) -> list[SpeculationStats]:
        """What came of drafts: one an engine."""
        return [engine.proposer.stats for engine in self.engines]

    def default_sampling_params(self) -> SamplingParams:
        """Return the model's own defaults, from its `generation_config.json`."""
        return self.engines[0].default_sampling_params()

    def reset_prefix_cache(self) -> None:
        """Forget the cached prefixes."""
        for engine, lock in zip(self.engines, self._locks, strict=True):
            with lock:
                engine.reset_prefix_cache()

    def check(self) -> None:
        """Check that no block is leaked, see `EngineCore.check`."""
        for engine, lock in zip(self.engines, self._locks, strict=True):
            with lock:
                engine.check()

    def _step(self, i: int) -> list[RequestOutput]:
        with self._locks[i]:
            return self.engines[i].step()


Engine = EngineCore | ReplicatedEngine


def make_engine(
    config: EngineConfig, report: Report = silent, files: ModelFiles | None = None
) -> Engine:
    """Make the engine that `config` asks for, of an opened model or of `config.load.model`.

    Raises:
        See `EngineCore` and `ReplicatedEngine`.
    """
    if config.parallel.node_rank > 0:
        raise ValueError(
            f"node_rank={config.parallel.node_rank} only follows node 0: start it with "
            "`arctic-jax serve --headless`"
        )
    if config.parallel.data_parallel_size > 1:
        return ReplicatedEngine(config, report, files)
    return EngineCore(config, report, files)
