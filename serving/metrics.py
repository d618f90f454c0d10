"""What is counted, for Prometheus. Names are vLLM's behind a prefix; what only we have is last.

Times of requests are observed by the event loop as outputs arrive; what is summed up is the
engines' own, which are looked at when somebody asks: so also what nobody waited for is counted.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.monitoring
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.request_totals import RequestTotals
from arctic_jax.engine.step_log import StepRecord
from arctic_jax.request import RequestMetrics, RequestOutput, SamplingParams
from arctic_jax.serving.limits import Admission

_TO_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN = (
    *(0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))
_STEP_TOKENS = tuple(float(2**power) for power in range(15))
_LABELS = ("model_name", "engine")
_COMPILED = "/jax/core/compile/backend_compile_duration"

_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _TO_FIRST),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", _BETWEEN),
    "request_time_per_output_token_seconds": ("Mean of a request, after its first.", _BETWEEN),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _LATENCY),
    "request_queue_time_seconds": ("From arrival to the first step.", _LATENCY),
    "request_inference_time_seconds": ("From the first step to the last token.", _LATENCY),
    "request_prefill_time_seconds": ("From the first step to the first token.", _LATENCY),
    "request_decode_time_seconds": ("From the first token to the last.", _LATENCY),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of all answers to a prompt.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens of the longest answer to it.", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Tokens of a prompt not found in the cache.", _TOKENS),
    "request_params_n": ("Answers asked for.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "request_params_max_tokens": ("Most tokens asked for.", _TOKENS),
    "request_num_preemptions": ("How often a request started over.", (0.0, 1.0, 2.0, 5.0, 10.0)),
    "iteration_tokens_total": ("Tokens of a step.", _STEP_TOKENS),
}
_COUNTERS: dict[str, tuple[str, Callable[[RequestTotals], int]]] = {
    "prompt_tokens": ("Tokens of prompts.", lambda t: t.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda t: t.generated_tokens),
    "prompt_tokens_cached": ("Tokens of prompts found in the cache.", lambda t: t.cached_tokens),
    "prefix_cache_queries": ("Tokens looked for in the cache.", lambda t: t.prompt_tokens),
    "prefix_cache_hits": ("Tokens found in the cache.", lambda t: t.cached_tokens),
    "num_preemptions": ("Answers that started over, their blocks gone.", lambda t: t.preemptions),
    "corrupted_requests": ("Answers that failed; see the log.", lambda t: t.ends["error"]),
}


class Metrics:
    """The figures of one server.

    Args:
        model_name: a label of every figure.
        prefix: of every name; `vllm:` serves dashboards and routers made for vLLM.
    """

    def __init__(self, model_name: str, prefix: str = "arctic_jax:") -> None:
        self.model_name = model_name
        self.prefix = prefix
        self.registry = CollectorRegistry()
        self.num_compilations = 0
        self.num_write_timeouts = 0
        self._histograms = {
            name: Histogram(prefix + name, text, _LABELS, buckets=buckets, registry=self.registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._collector = _EngineCollector(self)
        self._set_engines([RequestTotals()])
        self.registry.register(self._collector)

    def watch(self, cores: Sequence[EngineCore], admission: Admission) -> None:
        """Report of engines, and of compilations from now on, of which there should be none."""
        self._set_engines([core.outputs.totals for core in cores])
        self._collector.cores, self._collector.admission = cores, admission
        for core in cores:
            core.step_log.on_step = self._on_step
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        """Hear no more of compilations."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def exposition(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def observe(self, name: str, value: float, replica: int = 0) -> None:
        """Put a value of one of several equal engines into a histogram."""
        self._observers[name][replica].observe(value)

    def write_timed_out(self) -> None:
        """Count a connection that was closed because its client took nothing of its answer."""
        self.num_write_timeouts += 1

    def embedded(self, num_tokens: int, seconds: float) -> None:
        """Count a call that was answered with vectors."""
        (totals,) = self._collector.totals
        totals.prompt_tokens += num_tokens
        totals.ends["stop"] += 1
        self.observe("e2e_request_latency_seconds", seconds)

    def _set_engines(self, totals: Sequence[RequestTotals]) -> None:
        self._collector.totals = totals
        self._observers = {
            name: [histogram.labels(self.model_name, str(i)) for i in range(len(totals))]
            for name, histogram in self._histograms.items()
        }

    def _on_step(self, record: StepRecord) -> None:
        self.observe("iteration_tokens_total", record.num_tokens, record.replica)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.num_compilations += event == _COMPILED


class RequestTimer:
    """Observes one request as its deltas arrive, or its end with everything."""

    def __init__(self, metrics: Metrics, params: SamplingParams) -> None:
        self._metrics = metrics
        self._params = params
        self._num_tokens: collections.Counter[int] = collections.Counter()  # of each answer
        self._last_time: float | None = None

    def observe(self, output: RequestOutput) -> None:
        """Take what is new."""
        times = output.metrics
        if times is None:
            return
        for answer in output.outputs:
            self._num_tokens[answer.index] += len(answer.token_ids)
        new = sum(len(answer.token_ids) for answer in output.outputs)
        if self._last_time is None and times.first_token_time is not None:
            self._observe(
                times, "time_to_first_token_seconds", times.first_token_time - times.arrival_time
            )
            new, self._last_time = new - 1, times.first_token_time
        if new > 0 and self._last_time is not None and times.last_token_time is not None:
            # A slow reader or a draft brings several tokens at once: they share the time.
            gap = (times.last_token_time - self._last_time) * len(output.outputs) / new
            for _ in range(new):
                self._observe(times, "inter_token_latency_seconds", gap)
            self._last_time = times.last_token_time
        if output.finished:
            self._finish(output, times)

    def _observe(self, times: RequestMetrics, name: str, value: float) -> None:
        self._metrics.observe(name, value, times.replica)

    def _finish(self, output: RequestOutput, times: RequestMetrics) -> None:
        observe = functools.partial(self._observe, times)
        prompt, longest = len(output.prompt_token_ids), max(self._num_tokens.values(), default=0)
        observe("request_prompt_tokens", prompt)
        observe("request_prefill_kv_computed_tokens", prompt - output.num_cached_tokens)
        observe("request_generation_tokens", self._num_tokens.total())
        observe("request_max_num_generation_tokens", longest)
        observe("request_num_preemptions", times.num_preemptions)
        observe("request_params_n", self._params.n)
        if self._params.max_tokens is not None:
            observe("request_params_max_tokens", self._params.max_tokens)
        begun, first, last = (
            times.first_scheduled_time,
            times.first_token_time,
            times.last_token_time,
        )
        if begun is None or first is None or last is None:
            return
        observe("e2e_request_latency_seconds", last - times.arrival_time)
        observe("request_queue_time_seconds", begun - times.arrival_time)
        observe("request_inference_time_seconds", last - begun)
        observe("request_prefill_time_seconds", first - begun)
        observe("request_decode_time_seconds", last - first)
        if longest > 1:
            observe("request_time_per_output_token_seconds", (last - first) / (longest - 1))


class _EngineCollector(Collector):
    """Looks at the engines when somebody asks."""

    totals: Sequence[RequestTotals]
    cores: Sequence[EngineCore] = ()
    admission: Admission | None = None

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """Say nothing of the names in advance."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield a family for each figure."""
        yield from self._requests()
        closed = [[("", self._metrics.num_write_timeouts)]]
        text = "Connections closed because their clients took nothing of their answers."
        yield self._counter("write_timeouts", text, None, closed)
        if self.admission is None:
            return
        yield from self._gauges()
        yield from self._steps()
        yield from self._speculation()
        refused = self.admission.num_refused.items()
        yield self._counter(
            "admission_rejections", "Calls refused because too much waited.", "reason", [refused]
        )
        compiled = [[("", self._metrics.num_compilations)]]
        yield self._counter(
            "compilations_after_ready", "Programs compiled while serving.", None, compiled
        )

    def _requests(self) -> Iterator[Metric]:
        for name, (text, value) in _COUNTERS.items():
            yield self._counter(name, text, None, [[("", value(t))] for t in self.totals])
        ends = [t.ends.items() for t in self.totals]
        yield self._counter("request_success", "Answers that have ended.", "finished_reason", ends)

    def _gauges(self) -> Iterator[Metric]:
        schedulers = [core.scheduler for core in self.cores]
        used = [1 - s.pool.num_free / s.pool.num_blocks for s in schedulers]
        for name, text, values in (
            ("num_requests_running", "Answers in steps.", [len(s.running) for s in schedulers]),
            ("num_requests_waiting", "Answers that wait.", [len(s.waiting) for s in schedulers]),
            ("kv_cache_usage_perc", "Share of the cache's blocks in use.", used),
        ):
            family = GaugeMetricFamily(self._metrics.prefix + name, text, labels=_LABELS)
            for i, value in enumerate(values):
                family.add_metric((self._metrics.model_name, str(i)), value)
            yield family
        info = InfoMetricFamily(self._metrics.prefix + "cache_config", "Of the cache.")
        pool = schedulers[0].pool
        caching = str(pool.enable_prefix_caching)
        info.add_metric(
            (),
            {
                "model_name": self._metrics.model_name,
                "block_size": str(pool.block_size),
                "num_gpu_blocks": str(pool.num_blocks),
                "enable_prefix_caching": caching,
            },
        )
        yield info

    def _steps(self) -> Iterator[Metric]:
        totals = [dict(core.step_log.totals) for core in self.cores]
        for name, text, attribute in (
            ("steps", "Steps, by layout.", "steps"),
            ("step_tokens", "Tokens of steps, by layout.", "tokens"),
            ("step_padded_tokens", "Tokens computed, padding included.", "padded_tokens"),
            ("step_seconds", "Time of steps, by layout.", "seconds"),
        ):
            values = [
                [(layout, getattr(t, attribute)) for layout, t in of.items()] for of in totals
            ]
            yield self._counter(name, text, "layout", values)
        skipped = [
            [("", sum(t.tokens - t.rows for t in of.values()) if _narrows(core) else 0)]
            for core, of in zip(self.cores, totals, strict=True)
        ]
        text = "Tokens that left the model before its upper layers."
        yield self._counter("swiftkv_skipped_rows", text, None, skipped)

    def _speculation(self) -> Iterator[Metric]:
        stats = [core.proposer.stats for core in self.cores]
        drafts = [[("", s.num_drafts)] for s in stats]
        yield self._counter("spec_decode_num_drafts", "Drafts.", None, drafts)
        drafted = [[("", int(s.drafted.sum()))] for s in stats]
        yield self._counter("spec_decode_num_draft_tokens", "Tokens drafted.", None, drafted)
        accepted = [[("", int(s.accepted.sum()))] for s in stats]
        yield self._counter("spec_decode_num_accepted_tokens", "... and accepted.", None, accepted)
        for name, values in (("draft", "drafted"), ("accepted", "accepted")):
            each = [
                [(str(position), int(n)) for position, n in enumerate(getattr(s, values))]
                for s in stats
            ]
            yield self._counter(
                f"spec_decode_num_{name}_tokens_per_pos", "By position.", "position", each
            )

    def _counter(
        self, name: str, text: str, label: str | None, values: Iterable[Iterable[Any]]
    ) -> Metric:
        """Make a counter of (label's value, number) pairs of each engine."""
        labels = (*_LABELS, *([label] if label else []))
        family = CounterMetricFamily(self._metrics.prefix + name, text, labels=labels)
        for i, pairs in enumerate(values):
            for value, number in pairs:
                known = (self._metrics.model_name, str(i), *([value] if label else []))
                family.add_metric(known, number)
        return family


def _narrows(core: EngineCore) -> bool:
    """Whether tokens without logits skip the model's upper layers (SwiftKV)."""
    return core.runner.model_config.swiftkv is not None
