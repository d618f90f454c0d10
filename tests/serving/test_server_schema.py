"""What the server says about itself is true: calls drawn from its OpenAPI document."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_server import LiveServer, serve
from schemathesis.specs.openapi import checks

from arctic_jax.engine.core import EngineCore
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.limits import Limits

PATHS = {
    "/v1/completions": "post",
    "/v1/chat/completions": "post",
    "/v1/embeddings": "post",
    "/tokenize": "post",
    "/detokenize": "post",
    "/v1/models": "get",
    "/health": "get",
    "/version": "get",
    "/load": "get",
    "/metrics": "get",
}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 4},
    "/v1/embeddings": {"input": "ab"},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97]},
}
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
CONFIG = schemathesis.Config.from_dict({"seed": 1, "generation": {"database": "none"}})


@pytest.fixture(scope="module")
def bounded(tiny_core: EngineCore) -> Iterator[LiveServer]:
    """A server that does not let a random number ask for hours of work."""
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, limits=Limits(max_n=2, max_prompts=4)) as server:
        yield server
        server.wait_until_idle()
    engine.shutdown()


def test_the_document_has_every_path(bounded: LiveServer) -> None:
    document = bounded.get("/openapi.json").json()
    assert {path: "".join(methods) for path, methods in document["paths"].items()} == PATHS


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (path, mode)
        for path, method in PATHS.items()
        for mode in schemathesis.GenerationMode
        if method == "post" or mode.is_positive
    ],
)
def test_calls_as_documented(
    bounded: LiveServer, encoder: LiveServer, path: str, mode: schemathesis.GenerationMode
) -> None:
    """Right ones and wrong ones: no call is answered but as the document says, and in time."""
    server = encoder if path == "/v1/embeddings" else bounded
    document = server.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document, config=CONFIG)
    operation = schema[path][PATHS[path]]

    @settings(
        max_examples=20 if operation.body else 2,
        phases=[Phase.explicit, Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def ask(case: schemathesis.Case, data: st.DataObject) -> None:
        if path in GOOD and mode.is_positive:  # all at once are hardly ever right together
            drawn: Any = case.body
            fields = data.draw(st.permutations(sorted(drawn)))[:3]
            case.body = GOOD[path] | {field: drawn[field] for field in fields}
        start = time.monotonic()
        response = case.call(base_url=server.url, timeout=20)
        seconds = time.monotonic() - start
        shown = f"{json.dumps(case.body, default=repr)[:1000]} -> {response.text[:1000]}"
        statuses[response.status_code] += 1
        assert response.status_code < 500, shown
        if seconds > 1 and response.status_code != 200:  # twice: the machine may have been busy
            start = time.monotonic()
            case.call(base_url=server.url, timeout=20)
            assert time.monotonic() - start < 1, shown
        case.validate_response(response, checks=CHECKS)

    statuses: Counter[int] = Counter()
    ask()
    assert server.get("/health").status_code == 200
    if mode.is_positive:
        assert statuses[200]
    assert bounded.complete("ab", max_tokens=2).status_code == 200
