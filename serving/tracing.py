"""One span a call, sent to an OpenTelemetry collector (OTLP over HTTP).

Names are those of the semantic conventions for generative AI; what they have no name for is named
as vLLM names it. A caller's `traceparent` header makes the span a part of the caller's trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arctic_jax.request import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
}
_SAMPLING = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "max_tokens")

current_span: ContextVar[CallSpan | None] = ContextVar("current_span", default=None)
"""The span of the call that is being answered, if calls are traced."""


class Tracer:
    """Sends spans, in a thread of its own; a collector that is away holds nobody up.

    Args:
        endpoint: of the collector, such as `http://localhost:4318/v1/traces`.
        model_name: an attribute of every span.

    Raises:
        ValueError: the endpoint is no URL of that kind, or OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, model_name: str) -> None:
        if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
            raise ValueError(
                f"--otlp-traces-endpoint must be an http or https URL, got {endpoint!r}; a "
                "collector takes OTLP over HTTP on port 4318 at /v1/traces"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(
                "--otlp-traces-endpoint needs OpenTelemetry: pip install 'arctic-jax[tracing]'"
            ) from error
        # What the environment says (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) goes first.
        resource = Resource({"service.name": "arctic-jax"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("arctic_jax")
        self._model_name = model_name

    def start(self, operation: str, headers: Mapping[str, str]) -> CallSpan:
        """Begin the span of a call."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "arctic_jax",
                "gen_ai.request.model": self._model_name,
                "gen_ai.response.model": self._model_name,
            },
        )
        return CallSpan(span)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()


class CallSpan:
    """What is known of one call, until it has ended."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._usage: Counter[str] = Counter()
        self._finish_reasons: list[str] = []
        self._latencies: dict[str, float] = {}

    def asked(self, call_id: str, params: SamplingParams, streams: bool) -> None:
        """Note what a call wants."""
        given = {f"gen_ai.request.{name}": getattr(params, name) for name in _SAMPLING}
        if params.top_k > 0:
            given["gen_ai.request.top_k"] = params.top_k
        if params.n > 1:
            given["gen_ai.request.choice.count"] = params.n
        if params.stop_strings:
            given["gen_ai.request.stop_sequences"] = list(params.stop_strings)
        given |= {"gen_ai.request.id": call_id, "gen_ai.request.stream": streams}
        self._span.set_attributes({k: v for k, v in given.items() if v is not None})

    def observe(self, output: RequestOutput) -> None:
        """Take what is new of a prompt's answers."""
        self._usage["output_tokens"] += sum(len(answer.token_ids) for answer in output.outputs)
        self._finish_reasons += [a.finish_reason for a in output.outputs if a.finish_reason]
        if not output.finished:
            return
        self._usage["input_tokens"] += len(output.prompt_token_ids)
        self._usage["cache_read.input_tokens"] += output.num_cached_tokens
        times = output.metrics
        if times is None or times.first_scheduled_time is None:
            return
        begun, last = times.first_scheduled_time, times.last_token_time
        found = {"time_in_queue": begun - times.arrival_time}
        if times.first_token_time is not None and last is not None:
            found |= {
                "time_to_first_token": times.first_token_time - times.arrival_time,
                "e2e": last - times.arrival_time,
                "time_in_model_prefill": times.first_token_time - begun,
                "time_in_model_decode": last - times.first_token_time,
                "time_in_model_inference": last - begun,
            }
        # Of a call with several prompts the longest of each.
        for name, seconds in found.items():
            self._latencies[name] = max(seconds, self._latencies.get(name, 0.0))

    def embedded(self, num_tokens: int) -> None:
        """Note how many tokens a call's texts had."""
        self._usage["input_tokens"] += num_tokens

    def end(self, status: int | None, error: BaseException | None) -> None:
        """End the span: with the status of the response, if there was one, or what went wrong."""
        from opentelemetry.trace import StatusCode

        found: dict[str, Any] = {f"gen_ai.usage.{name}": n for name, n in self._usage.items()}
        found |= {f"gen_ai.latency.{name}": s for name, s in self._latencies.items()}
        if self._finish_reasons:
            found["gen_ai.response.finish_reasons"] = self._finish_reasons
        if status is not None:
            found["http.response.status_code"] = status
        failed = error is not None or status is None or status >= 400
        if failed:
            found["error.type"] = type(error).__name__ if error is not None else str(status)
            self._span.set_status(StatusCode.ERROR)
        self._span.set_attributes(found)
        self._span.end()


class Tracing:
    """Makes a span of every call that a model answers; plain ASGI.

    Args:
        app: what answers.
        tracer: sends the spans.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Trace one call."""
        operation = _OPERATIONS.get(scope.get("path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or operation is None:
            await self._app(scope, receive, send)
            return
        span = self._tracer.start(operation, Headers(scope=scope))
        status: int | None = None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = current_span.set(span)
        failure: BaseException | None = None
        try:
            await self._app(scope, receive, noted)
        except BaseException as error:
            failure = error
            raise
        finally:
            current_span.reset(token)
            span.end(status, failure)
