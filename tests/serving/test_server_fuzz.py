"""Malformed bodies: each is answered within a second, and the next good call works."""

import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from live_server import LiveServer

from arctic_jax.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

DEEP = "[" * 400 + "]" * 400
# As JSON text: some of these no library writes.
VALUES = [
    *("null", "true", "1", "-1", "0", "1.5", "-0.0", '""', '"x"', "[]", "{}", "[null]", '[""]'),
    *("9" * 30, "-" + "9" * 30, "9" * 5000, "1e400", "-1e400", "NaN", "Infinity", "1e-320"),
    *(r'"\ud800"', r'["\ud800"]', r'"\u0000"', r'["\u0000"]', r'{"\ud800": "\udfff"}'),
    *('"' + "y" * 100_000 + '"', "[" + "7," * 20_000 + "7]", '[{"role": "user"}]'),
    *(DEEP, '{"a":' * 300 + "1" + "}" * 300, "[" * 100_000, '[[["x"]]]', "[[1], 2]", "[true]"),
    *('{"1": 100, "2": -100}', '{"x": 1}', '{"1": null}', '{"99999": 1}', '{"type": "text"}'),
    '{"include_usage": "perhaps"}',
    '[{"role": "user", "content": 5}]',
    '[{"role": 5, "content": "x"}]',
    '[{"role": "user", "content": [5]}]',
    '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]',
    '[{"type": "function", "function": {"name": null}}]',
]
GOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "ab", "max_tokens": 2}),
    "/v1/chat/completions": (
        ChatCompletionRequest,
        {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
    ),
    "/v1/embeddings": (EmbeddingRequest, {"input": "ab"}),
    "/tokenize": (TokenizeRequest, {"prompt": "ab"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [97]}),
}
UNKNOWN = ("guided_json", "structured_outputs", "best_of", "x", "__class__", "self")


def bodies(path: str) -> Iterator[tuple[str, str]]:
    kind, good = GOOD[path]
    for field in [*kind.model_fields, *UNKNOWN]:
        rest = {name: value for name, value in good.items() if name != field}
        for value in VALUES:
            start = json.dumps(rest)[:-1] + (", " if rest else "")
            yield field, start + json.dumps(field) + ": " + value + "}"


def post(client: httpx2.Client, path: str, body: str | bytes) -> tuple[httpx2.Response, float]:
    """Return the answer and its seconds; if they are many, those of a second time."""
    for last in (False, True):  # the machine may have been busy
        start = time.monotonic()
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        seconds = time.monotonic() - start
        if seconds < 1 or last:
            return response, seconds
    raise AssertionError


@pytest.mark.parametrize("path", GOOD)
def test_every_field_with_every_value(live: LiveServer, path: str) -> None:
    with live.client() as client:
        for field, body in bodies(path):
            response, seconds = post(client, path, body)
            shown = f"{field}: {body[:300]} -> {response.text[:300]}"
            assert 200 <= response.status_code < 300 or 400 <= response.status_code < 500, shown
            assert seconds < 1, shown
            if response.status_code != 200:
                assert set(response.json()) == {"error"}, shown
        good, _ = post(client, "/v1/completions", '{"prompt": "ab", "max_tokens": 2}')
        assert good.status_code == 200
    live.wait_until_idle()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"\0",
        b'{"prompt": "\xff"}',
        b"{" * 10**5,
    ],
)
@pytest.mark.parametrize("path", GOOD)
def test_bodies_that_are_no_objects(live: LiveServer, path: str, body: bytes) -> None:
    with live.client() as client:
        response, seconds = post(client, path, body)
        assert response.status_code == 400
        assert seconds < 1
        assert set(response.json()) == {"error"}


def test_pairs_of_extremes(live: LiveServer) -> None:
    """Parameters that are right each on their own, together: nothing may take the engine down."""
    draw = random.Random(0)
    choices: dict[str, list[Any]] = {
        "temperature": [0, 1e-9, 2],
        "top_k": [-1, 1, 10**30],
        "top_p": [1e-9, 1],
        "min_p": [0, 1],
        "n": [1, 3],
        "max_tokens": [1, 5, None],
        "min_tokens": [0, 1, 10**20],
        "logprobs": [None, 0, 20],
        "prompt_logprobs": [None, 3],
        "echo": [False, True],
        "seed": [None, -(2**63), 2**63 - 1],
        "presence_penalty": [-2, 2],
        "repetition_penalty": [1e-30, 1e30],
        "logit_bias": [None, {"97": 100, "98": -100}],
        "allowed_token_ids": [None, [97], [257]],
        "bad_words": [None, ["a"], ["\0", "é"]],
        "stop": [None, "a", ["\0", "b"]],
        "ignore_eos": [False, True],
        "stream": [False, True],
        "priority": [0, 10**40],
        "truncate_prompt_tokens": [None, 0, 1, -1],
        "cache_salt": [None, "é"],
    }
    with live.client() as client:
        for _ in range(150):
            body = {name: draw.choice(values) for name, values in choices.items()}
            body["prompt"] = draw.choice(["ab", [97, 260], ["x", "y"]])
            response, _ = post(client, "/v1/completions", json.dumps(body))
            status = response.status_code
            assert 200 <= status < 300 or 400 <= status < 500, (body, response.text)
    live.wait_until_idle()
    assert live.complete("ab", max_tokens=2).status_code == 200


def test_bytes_that_are_no_http(live: LiveServer) -> None:
    port = int(live.url.rpartition(":")[2])
    draw = random.Random(0)
    for i in range(20):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\ncontent-length: " if i % 2 else b""
            connection.sendall(head + draw.randbytes(200) + b"\r\n\r\n")
            connection.recv(1000)
    assert live.complete("ab", max_tokens=2).status_code == 200
