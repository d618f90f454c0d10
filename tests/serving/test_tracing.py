"""Spans as a collector gets them: here a small HTTP server that takes OTLP."""

import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from live_server import LiveServer, serve
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from arctic_jax.engine.core import EngineCore
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.server import HttpOptions
from arctic_jax.serving.tracing import Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(HTTPServer):
    """Keeps every span that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.services: set[str] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class _Handler(BaseHTTPRequestHandler):
    server: Collector  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.services.add(attributes(resource.resource)["service.name"])
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(of: Any) -> dict[str, Any]:
    """Attributes of a span or of a resource."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        found = getattr(value, kind)
        return [plain(v) for v in found.values] if kind == "array_value" else found

    return {attribute.key: plain(attribute.value) for attribute in of.attributes}


def test_a_span_a_call(collector: Collector, tiny_core: EngineCore) -> None:
    engine, tracer = AsyncEngine(engine=tiny_core), Tracer(collector.endpoint, "tiny")
    with serve(engine, http=HttpOptions(tracer=tracer)) as server:
        call: dict[str, Any] = {"prompt": ["abc", "ab"], "max_tokens": 5, "n": 2, "seed": 3}
        call |= {"ignore_eos": True, "top_k": 9, "stop": "\0\0\0"}
        answer = server.post(
            "/v1/completions", call, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}
        ).json()
        with server.client() as client:
            chat = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 7}
            chat |= {"ignore_eos": True, "stream": True, "temperature": 0.5}
            with client.stream("POST", "/v1/chat/completions", json=chat) as stream:
                assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
        assert server.complete("ab", temperature=-1).status_code == 400
        for path in ("/health", "/v1/models", "/metrics"):  # no calls of the model
            assert server.get(path).status_code == 200
    tracer.close()
    engine.shutdown()
    completion, conversation, wrong = collector.spans
    assert collector.services == {"arctic-jax"}
    assert {span.kind for span in collector.spans} == {Span.SPAN_KIND_SERVER}

    assert completion.name == "text_completion tiny"
    assert (completion.trace_id.hex(), completion.parent_span_id.hex()) == (TRACE, PARENT)
    assert completion.status.code == Status.STATUS_CODE_UNSET
    found = attributes(completion)
    seconds = {
        name.removeprefix("gen_ai.latency."): found.pop(name)
        for name in list(found)
        if name.startswith("gen_ai.latency.")
    }
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "arctic_jax",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.id": answer["id"].removeprefix("cmpl-"),
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 9,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stop_sequences": ["\0\0\0"],
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ["length"] * 4,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.response.status_code": 200,
    }
    assert 0 < seconds["time_to_first_token"] <= seconds["e2e"]
    took = (completion.end_time_unix_nano - completion.start_time_unix_nano) / 1e9
    assert seconds["e2e"] < took + 0.01
    assert 0 < seconds["time_in_model_inference"] <= seconds["e2e"]
    assert seconds["time_in_queue"] <= seconds["time_to_first_token"]

    found = attributes(conversation)
    assert conversation.name == "chat tiny"
    assert conversation.trace_id.hex() != TRACE
    assert found["gen_ai.request.stream"] is True
    assert found["gen_ai.request.temperature"] == 0.5
    assert found["gen_ai.usage.output_tokens"] == 7
    assert found["gen_ai.response.finish_reasons"] == ["length"]

    assert wrong.status.code == Status.STATUS_CODE_ERROR
    assert attributes(wrong)["http.response.status_code"] == 400
    assert attributes(wrong)["error.type"] == "400"
    assert "gen_ai.usage.output_tokens" not in attributes(wrong)


def test_an_embedding_and_a_client_that_leaves(
    collector: Collector, tiny_core: EngineCore, encoder: LiveServer
) -> None:
    tracer = Tracer(collector.endpoint, "tiny")
    with serve(encoder.engine, http=HttpOptions(tracer=tracer)) as server:
        tokens = server.post("/v1/embeddings", {"input": ["a", "b"]}).json()["usage"]
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, http=HttpOptions(tracer=tracer)) as server:
        body = {"prompt": "ab", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with server.client() as client, client.stream("POST", "/v1/completions", json=body) as s:
            lines = s.iter_lines()
            next(lines)
        server.wait_until_idle()
    engine.shutdown()
    tracer.close()
    embedding, left = map(attributes, collector.spans)
    assert embedding["gen_ai.operation.name"] == "embeddings"
    assert embedding["gen_ai.usage.input_tokens"] == tokens["prompt_tokens"]
    assert 0 < left["gen_ai.usage.output_tokens"] < 400
    assert "gen_ai.response.finish_reasons" not in left


def test_a_collector_that_is_away_harms_nobody(tiny_core: EngineCore) -> None:
    engine, tracer = AsyncEngine(engine=tiny_core), Tracer("http://127.0.0.1:9/v1/traces", "tiny")
    with serve(engine, http=HttpOptions(tracer=tracer)) as server:
        for _ in range(5):
            assert server.complete("ab", max_tokens=2).status_code == 200
    tracer.close()
    engine.shutdown()


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://localhost:4317", "http://", ""])
def test_other_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="--otlp-traces-endpoint must be an http or https URL"):
        Tracer(endpoint, "tiny")


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"pip install 'arctic-jax\[tracing\]'"):
        Tracer("http://localhost:4318/v1/traces", "tiny")
