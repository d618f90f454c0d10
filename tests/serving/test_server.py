"""The endpoint over a real socket, with a tiny random model: shapes, streams, refusals."""

import contextlib
import json
import math
import time
from typing import Any

import httpx2
import pytest
from live_server import Limits, LiveServer, serve

from arctic_jax.engine.core import EngineCore
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.server import HttpOptions

GREEDY = {"temperature": 0, "max_tokens": 8}


def events(server: LiveServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a stream, which must end with [DONE]."""
    response = server.post(path, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    found = [part.removeprefix("data: ") for part in parts]
    assert found.pop() == "[DONE]"
    return [json.loads(one) for one in found]


def test_a_completion(live: LiveServer) -> None:
    answer = live.complete("hello", **GREEDY).json()
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert abs(answer["created"] - time.time()) < 60
    (choice,) = answer["choices"]
    assert (choice["index"], choice["logprobs"], choice["stop_reason"]) == (0, None, None)
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_text_and_token_ids_are_the_same_prompt(live: LiveServer) -> None:
    ids = live.post("/tokenize", {"prompt": "hello"}).json()["tokens"]
    texts = [
        live.complete(prompt, **GREEDY).json()["choices"][0]["text"]
        for prompt in ("hello", ids, ["hello"], [ids])
    ]
    assert len(set(texts)) == 1


def test_batches_and_several_answers_are_numbered(live: LiveServer) -> None:
    body = {"n": 2, "max_tokens": 4, "temperature": 1, "seed": 3, "ignore_eos": True}
    many = live.complete(["ab", "cd", "ef"], **body).json()
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3, 4, 5]
    assert many["usage"]["completion_tokens"] == 24
    alone = live.complete("cd", **body).json()
    assert [c["text"] for c in alone["choices"]] == [c["text"] for c in many["choices"][2:4]]


@pytest.mark.parametrize("fields", [{}, {"n": 2, "temperature": 0.9, "seed": 1}, {"stop": "e"}])
def test_streams_add_up_to_the_answer(live: LiveServer, fields: dict[str, Any]) -> None:
    body = {"prompt": ["ab", "tea"], **GREEDY, "max_tokens": 12, "logprobs": 2, **fields}
    whole = live.post("/v1/completions", body).json()
    body["stream_options"] = {"include_usage": True}
    chunks = events(live, "/v1/completions", body)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all("usage" not in chunk for chunk in chunks[:-1])
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            streamed = [value for part in parts for value in part["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert streamed == values
            assert len(streamed) == len(values)
        ends = [part["finish_reason"] for part in parts]
        assert ends == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]


def test_usage_with_every_chunk(live: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "ab", **GREEDY, "ignore_eos": True, "stream_options": options}
    chunks = events(live, "/v1/completions", body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_echo_scores_a_prompt(live: LiveServer) -> None:
    """What lm_eval asks for: log-probabilities of a prompt, with a token more and without."""
    fields = {"echo": True, "logprobs": 1, "temperature": 0}
    (scored,) = live.complete("hello", max_tokens=0, **fields).json()["choices"]
    assert scored["text"] == "hello"
    assert scored["finish_reason"] == "length"
    lists = scored["logprobs"]
    assert lists["tokens"] == list("hello")
    assert lists["text_offset"] == [0, 1, 2, 3, 4]
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    assert all(value < 0 for value in lists["token_logprobs"][1:])
    for token, value, top in zip(
        lists["tokens"][1:], lists["token_logprobs"][1:], lists["top_logprobs"][1:], strict=True
    ):
        assert math.isclose(top[token], value)
        assert max(top.values()) >= value
    usage = live.complete("hello", max_tokens=0, **fields).json()["usage"]
    assert usage["completion_tokens"] == 0
    longer = live.complete("hello", max_tokens=1, **fields).json()["choices"][0]
    assert longer["text"].startswith("hello")
    assert longer["logprobs"]["token_logprobs"][:5] == lists["token_logprobs"]
    assert len(longer["logprobs"]["tokens"]) == 6


def test_the_likeliest_is_known_where_tokens_share_a_name(live: LiveServer) -> None:
    """Whether a text is what a greedy model writes, lm_eval finds in the largest value."""
    prompt = list(range(0x80, 0xC0))  # no byte of these is a character
    fields = {"echo": True, "max_tokens": 0, "temperature": 0, "logprobs": 3}
    (choice,) = live.complete(prompt, **fields, prompt_logprobs=3).json()["choices"]
    lists = choice["logprobs"]
    shared = 0
    for token, named, by_id in zip(
        prompt[1:], lists["top_logprobs"][1:], choice["prompt_logprobs"][1:], strict=True
    ):
        shared += len(named) < len(by_id)
        assert math.isclose(max(named.values()), max(one["logprob"] for one in by_id.values()))
        assert str(token) in by_id
    assert shared > 0


def test_echo_of_a_stream(live: LiveServer) -> None:
    body = {"prompt": "hello", **GREEDY, "echo": True, "logprobs": 0}
    whole = live.post("/v1/completions", body).json()["choices"][0]
    parts = [chunk["choices"][0] for chunk in events(live, "/v1/completions", body)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]


def test_prompt_logprobs_and_token_ids(live: LiveServer) -> None:
    fields = GREEDY | {"prompt_logprobs": 1, "return_token_ids": True}
    (choice,) = live.complete("abc", **fields).json()["choices"]
    assert choice["prompt_token_ids"] == [97, 98, 99]
    assert len(choice["token_ids"]) == 8
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [str(token) in other for token, other in zip((98, 99), others, strict=True)]
    (named,) = live.complete("abc", **GREEDY, logprobs=0, return_tokens_as_token_ids=True).json()[
        "choices"
    ]
    assert named["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


def test_a_stop_string(live: LiveServer) -> None:
    text = live.complete("hello", **GREEDY).json()["choices"][0]["text"]
    stop = text[3]
    (choice,) = live.complete("hello", **GREEDY, stop=[stop, "\0"]).json()["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_a_prompt_seen_before_is_cached(live: LiveServer) -> None:
    prompt = "a prompt of more than a block's sixteen tokens"
    live.complete(prompt, **GREEDY)
    usage = live.complete(prompt, **GREEDY).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 32


def test_max_tokens_is_cut_to_what_is_left(live: LiveServer) -> None:
    answer = live.complete([5] * 500, temperature=0, max_tokens=512, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["choices"][0]["finish_reason"] == "length"


def test_truncation_keeps_the_end(live: LiveServer) -> None:
    (choice,) = live.complete(
        "abcdef", **GREEDY, truncate_prompt_tokens=2, return_token_ids=True
    ).json()["choices"]
    assert choice["prompt_token_ids"] == [101, 102]


def test_a_chat(live: LiveServer) -> None:
    answer = live.chat(temperature=0, max_completion_tokens=6, logprobs=True, top_logprobs=2).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert "tool_calls" not in choice["message"]
    assert answer["usage"]["prompt_tokens"] == len("hello") + 3  # the roles and the end
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    for token in content:
        assert len(token["top_logprobs"]) == 2
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]
        assert bytes(token["bytes"]).decode() == token["token"]


def test_a_chat_in_a_stream(live: LiveServer) -> None:
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "n": 2,
        "seed": 5,
        "temperature": 1,
        "max_tokens": 9,
        "stream_options": {"include_usage": True},
    }
    without = {name: value for name, value in body.items() if name != "stream_options"}
    whole = live.post("/v1/chat/completions", without).json()
    chunks = events(live, "/v1/chat/completions", body)
    assert chunks[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == choice["message"]["content"]
        assert all("role" not in part["delta"] for part in parts[1:])
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_tokens_there_and_back(live: LiveServer) -> None:
    found = live.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == 3
    assert found["max_model_len"] == 512
    assert live.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "hé"}
    messages = [{"role": "user", "content": "x"}]
    assert live.post("/tokenize", {"messages": messages}).json()["tokens"] == [259, 120, 257, 260]


def test_what_is_there(live: LiveServer) -> None:
    models = live.get("/v1/models").json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["tiny", "alias"]
    assert {model["max_model_len"] for model in models["data"]} == {512}
    assert live.get("/health").content == b""
    assert set(live.get("/version").json()) == {"version"}
    assert live.get("/load").json() == {"server_load": 0}
    assert "swagger" in live.get("/docs").text
    paths = live.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/embeddings"} <= set(paths)


LONG = "This model's maximum context length is 512 tokens. However, your prompt contains 600 input"
GOLDEN: list[tuple[str, dict[str, Any], int, str, str | None, str]] = [
    # path, body, status, type, param, message
    (
        "/v1/completions",
        {"temperature": -1},
        400,
        "BadRequestError",
        "temperature",
        "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)",
    ),
    (
        "/v1/completions",
        {"max_tokens": 513},
        400,
        "BadRequestError",
        "max_tokens",
        "max_tokens=513 cannot be greater than max_model_len=512. Please request fewer output "
        "tokens.",
    ),
    ("/v1/completions", {"prompt": [1] * 600}, 400, "BadRequestError", "input_tokens", LONG),
    (
        "/v1/completions",
        {"prompt": "x" * 20_000},
        400,
        "BadRequestError",
        "input_text",
        "your prompt contains 20000 characters (more than",
    ),
    (
        "/v1/completions",
        {"model": "other"},
        404,
        "NotFoundError",
        "model",
        "The model `other` does not exist. Valid aliases: tiny, alias.",
    ),
    (
        "/v1/completions",
        {"prompt": 3, "max_tokens": "x"},
        400,
        "Bad Request",
        "body.prompt",
        "2 validation errors:\n  body.prompt: must be text, token ids, or a list of either "
        "(input: 3)\n  body.max_tokens: Input should be a valid integer",
    ),
    ("/v1/completions", {"prompt": ""}, 400, "BadRequestError", "prompt", "must not be empty"),
    ("/v1/completions", {"prompt": [300]}, 400, "BadRequestError", "prompt", "token id 300 is not"),
    ("/v1/completions", {"n": 2, "temperature": 0}, 400, "BadRequestError", "n", "must be 1 when"),
    ("/v1/completions", {"n": 129}, 400, "BadRequestError", "n", "n must be at most 128, got 129."),
    ("/v1/completions", {"logprobs": 21}, 400, "BadRequestError", "logprobs", "at most 20, got 21"),
    ("/v1/completions", {"stop": ["x"] * 17}, 400, "BadRequestError", "stop", "at most 16, got 17"),
    ("/v1/completions", {"stop": [""]}, 400, "BadRequestError", "stop", "non-empty strings"),
    (
        "/v1/completions",
        {"prompt": ["x"] * 1025},
        400,
        "BadRequestError",
        "prompt",
        "prompt must be at most 1024, got 1025.",
    ),
    (
        "/v1/completions",
        {"stream_options": {"include_usage": True}},
        400,
        "BadRequestError",
        "stream_options",
        "stream_options can only be used with stream=true.",
    ),
    ("/v1/completions", {"suffix": "x"}, 400, "BadRequestError", "suffix", "is not supported"),
    (
        "/v1/completions",
        {"guided_json": {}},
        400,
        "BadRequestError",
        "guided_json",
        "guided_json is not supported: use structured_outputs.",
    ),
    (
        "/v1/chat/completions",
        {"response_format": {"type": "structural_tag"}},
        400,
        "BadRequestError",
        "response_format",
        "must be text, json_object or json_schema, got 'structural_tag'.",
    ),
    (
        "/v1/chat/completions",
        {"structured_outputs": {"structural_tag": "a"}},
        400,
        "BadRequestError",
        "structured_outputs",
        "structured_outputs.structural_tag is not supported.",
    ),
    ("/v1/chat/completions", {"messages": []}, 400, "BadRequestError", "messages", "not be empty"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "BadRequestError",
        "messages",
        "a part of type 'image_url' is not supported",
    ),
    ("/v1/chat/completions", {"top_logprobs": 2}, 400, "BadRequestError", "top_logprobs", "needs"),
    (
        "/v1/chat/completions",
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        400,
        "BadRequestError",
        "tool_choice",
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser',
    ),
    (
        "/v1/chat/completions",
        {"chat_template": "{{ 1 }}"},
        400,
        "BadRequestError",
        "chat_template",
        "without --trust-request-chat-template",
    ),
    (
        "/v1/chat/completions",
        {"chat_template_kwargs": {"messages": []}},
        400,
        "BadRequestError",
        "chat_template_kwargs",
        "must not hold 'messages'",
    ),
    (
        "/v1/embeddings",
        {"input": "x"},
        400,
        "BadRequestError",
        "model",
        "The model `tiny` does not support embeddings.",
    ),
    ("/tokenize", {}, 400, "BadRequestError", "prompt", "Give either prompt or messages."),
    ("/detokenize", {"tokens": [-1]}, 400, "BadRequestError", "tokens", "token id -1 is not in"),
    ("/v2/nothing", {}, 404, "Not Found", None, "Not Found"),
    ("/v1/models", {}, 405, "Method Not Allowed", None, "Method Not Allowed"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "kind", "param", "message"), GOLDEN)
def test_errors(
    live: LiveServer,
    path: str,
    body: dict[str, Any],
    status: int,
    kind: str,
    param: str | None,
    message: str,
    stream: bool,
) -> None:
    """Also in a stream: what is wrong is known before the first byte."""
    good: dict[str, Any] = {"/v1/completions": {"prompt": "x"}}.get(path, {})
    if path == "/v1/chat/completions":
        good = {"messages": [{"role": "user", "content": "x"}]}
    if stream and path.startswith("/v1/c") and "stream_options" not in body:
        good = good | {"stream": True}
    response = live.post(path, good | body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (kind, param, status)
    assert message in error["message"]
    assert "/work" not in error["message"]
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_taken(live: LiveServer, kind: str) -> None:
    with live.client() as client:
        response = client.post(
            "/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind}
        )
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message == "Unsupported Media Type: Only 'application/json' is allowed"


def test_error_replies_stay_small(live: LiveServer) -> None:
    wrong = [{"a": "b" * 100}] * 10_000
    for body in ({"prompt": wrong}, {"prompt": "x", "stop_token_ids": wrong, "model": "m" * 10**6}):
        response = live.post("/v1/completions", body)
        assert response.status_code == 400
        assert len(response.content) < 5_000


def test_keys(tiny_core: EngineCore) -> None:
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, http=HttpOptions(api_keys=["one", "two"])) as server:
        for path in (
            "/metrics",
            "/docs",
            "/v1/models",
            "/tokenize",
            "/nothing",
            "//health",
            "/load",
        ):
            response = server.get(path)
            assert response.status_code == 401, path
            assert response.json() == {"error": "Unauthorized"}
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models", headers={"authorization": "one"}).status_code == 401
        for key, status in (("one", 200), ("two", 200), ("tw", 401), ("three", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert server.get("/v1/models", headers=headers).status_code == status
        assert server.get("/v1/models", headers={"authorization": "Basic one"}).status_code == 401
    engine.shutdown()


def test_open_metrics_and_foreign_pages(tiny_core: EngineCore) -> None:
    engine = AsyncEngine(engine=tiny_core)
    http = HttpOptions(api_keys=["k"], public_metrics=True, allowed_origins=["https://good"])
    with serve(engine, http=http) as server:
        assert server.get("/metrics").status_code == 200
        headers = {"origin": "https://good", "access-control-request-method": "POST"}
        with server.client() as client:
            response = client.options("/v1/completions", headers=headers)
            assert response.headers["access-control-allow-origin"] == "https://good"
            headers["origin"] = "https://evil"
            response = client.options("/v1/completions", headers=headers)
            assert "access-control-allow-origin" not in response.headers
    engine.shutdown()


def test_large_bodies_and_headers_are_refused(tiny_core: EngineCore) -> None:
    engine = AsyncEngine(engine=tiny_core)
    with serve(
        engine,
        limits=Limits(max_body_bytes=1000),
        http=HttpOptions(max_header_bytes=2048),
    ) as server:
        response = server.complete("x" * 2000)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == 413

        def pieces() -> Any:
            yield from [b'{"prompt": "' + b"x" * 900] * 4

        with server.client() as client:
            kind = {"content-type": "application/json"}
            response = client.post("/v1/completions", content=pieces(), headers=kind)
            assert response.status_code == 413
            for size, status in ((1000, 200), (3000, 400)):
                response = client.get("/health", headers={"x": "y" * size})
                assert response.status_code == status
            with contextlib.suppress(httpx2.TransportError):  # it may hang up on who still writes
                response = client.get("/health", headers={"x": "y" * 300_000})
                assert response.status_code == 400
        assert server.complete("x", max_tokens=1).status_code == 200
    engine.shutdown()


def test_a_full_queue_says_come_back(
    tiny_core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tiny_core.step
    monkeypatch.setattr(tiny_core, "step", lambda: time.sleep(0.01) or step())
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, limits=Limits(max_num_queued_reqs=2)) as server, server.client() as client:
        body = {"prompt": ["x"] * 6, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # to forget it would be to leave
            next(lines)
            response = server.complete("x")
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["message"].startswith("The engine is currently busy")
            assert response.json()["error"]["type"] == "Service Unavailable"
            assert "admission_rejections_total" in server.get("/metrics").text
        server.wait_until_idle()
        assert server.complete("x", max_tokens=1).status_code == 200
    engine.shutdown()


def test_clients_that_go_away_leave_nothing(live: LiveServer) -> None:
    body = {"prompt": ["ab", "cd"], "max_tokens": 400, "ignore_eos": True}
    with live.client() as client:
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            next(stream.iter_lines())
        live.wait_until_idle(2)
        with pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.1)
        live.wait_until_idle(2)


def test_metrics_agree_with_what_was_asked(tiny_core: EngineCore) -> None:
    def read(server: LiveServer) -> dict[str, float]:
        lines = [line for line in server.get("/metrics").text.splitlines() if line[0] != "#"]
        return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines}

    engine = AsyncEngine(engine=tiny_core)
    with serve(engine) as server:
        before = read(server)
        for _ in range(3):
            server.complete("hello", **GREEDY, ignore_eos=True)
        events(server, "/v1/completions", {"prompt": "hello", **GREEDY, "ignore_eos": True})
        server.wait_until_idle()
        after = read(server)
        # What engines count goes on from server to server.
        new = {name: value - before.get(name, 0) for name, value in after.items()}
        labels = '{engine="0",model_name="tiny"}'
        assert new[f"arctic_jax:prompt_tokens_total{labels}"] == 20
        assert new[f"arctic_jax:generation_tokens_total{labels}"] == 32
        assert new[f"arctic_jax:time_to_first_token_seconds_count{labels}"] == 4
        assert new[f"arctic_jax:inter_token_latency_seconds_count{labels}"] == 28
        done = '{engine="0",finished_reason="length",model_name="tiny"}'
        assert new[f"arctic_jax:request_success_total{done}"] == 4
        assert after[f"arctic_jax:num_requests_running{labels}"] == 0
        assert after[f"arctic_jax:kv_cache_usage_perc{labels}"] == 0
        assert after[f"arctic_jax:compilations_after_ready_total{labels}"] == 0
        layout = '{engine="0",layout="shift",model_name="tiny"}'
        assert new[f"arctic_jax:steps_total{layout}"] >= 28
        assert new[f"arctic_jax:iteration_tokens_total_sum{labels}"] >= 4 * (5 + 7) - 4 * 5
    engine.shutdown()
