"""Structured output over HTTP: a real model's JSON, streams, calls of tools, and errors."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from live_server import CLIENT, LiveServer, serve

from arctic_jax.serving import reasoning_parsers, tool_parsers
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.structured_outputs import StructuredOutputsConfig

MODEL = "smollm2-135m-instruct"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "languages": {"type": "array", "items": {"enum": ["de", "fr", "it"]}, "maxItems": 2},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": PERSON},
}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
    parameters["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS: Any = [
    tool("weather", city={"enum": ["Bern", "Chur"]}),
    tool("add", a={"$ref": "#/$defs/small"}, b={"type": "integer", "minimum": 0, "maximum": 9}),
]
TOOLS[1]["function"]["parameters"]["$defs"] = {"small": {"enum": [1, 2]}}


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    # As in test_server_openai.py, whose programs are then stored.
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 32}
    engine = AsyncEngine(MODEL, max_model_len=256, num_blocks=32, **options)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module", params=["hermes", "llama3_json"])
def smollm(request: pytest.FixtureRequest, engine: AsyncEngine) -> Iterator[LiveServer]:
    parser = tool_parsers.PARSERS[request.param]
    reasoning = reasoning_parsers.PARSERS["deepseek_r1"]
    with serve(engine, tool_parser=parser, reasoning_parser=reasoning) as server:
        yield server
        server.wait_until_idle()


def client_of(live: LiveServer) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(**CLIENT)
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", http_client=http, max_retries=0)


ASK: Any = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Invent a person."}],
    "temperature": 0,
    "max_tokens": 80,
}


def test_json_schema_whole_and_streamed(smollm: LiveServer) -> None:
    with client_of(smollm) as client:
        choice = client.chat.completions.create(**ASK, response_format=FORMAT).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)
        assert "reasoning" not in (choice.message.model_extra or {}) or (
            choice.message.model_extra["reasoning"] is None
        )
        chunks = list(client.chat.completions.create(**ASK, response_format=FORMAT, stream=True))
    pieces = [c.choices[0].delta.content or "" for c in chunks]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_must_be_called(smollm: LiveServer, stream: bool) -> None:
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    named = {"type": "function", "function": {"name": "add"}}
    with client_of(smollm) as client:
        for options in (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"tool_choice": named},
        ):
            asked = {**ASK, "tools": TOOLS, **options}
            if stream:
                with client.chat.completions.stream(**asked) as events:
                    choice = events.get_final_completion().choices[0]
            else:
                choice = client.chat.completions.create(**asked).choices[0]
            assert choice.finish_reason == "tool_calls"
            calls = choice.message.tool_calls or []
            assert len(calls) == 1
            call = calls[0]
            assert options["tool_choice"] == "required" or call.function.name == "add"
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(arguments, schemas[call.function.name])


def test_structured_outputs_of_completions(live: LiveServer) -> None:
    for form, pattern in (
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "x"~2..3'}, "x{2,3}"),
    ):
        answer = live.complete(structured_outputs=form, n=2, temperature=1, max_tokens=9).json()
        for choice in answer["choices"]:
            assert re.fullmatch(pattern, choice["text"]), answer
            assert choice["finish_reason"] == "stop"
    answer = live.complete(response_format={"type": "json_object"}, max_tokens=1).json()
    assert answer["choices"][0]["text"] == "{"


SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}
DEEP = json.loads('{"items":' * 40 + "{}" + "}" * 40)
ERRORS = [
    ({"response_format": {"type": "xml"}}, "response_format", "json_object or json_schema, got"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "that has a schema"),
    ({"response_format": SCHEMA}, "response_format", "response_format is not valid: Invalid type"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "is not valid"),
    ({"structured_outputs": {"json": DEEP}}, "structured_outputs.json", "at most 32 deep"),
    ({"structured_outputs": {"backend": "x"}}, "structured_outputs", "backend is not supported"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "cannot be used together with response_format",
    ),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "must be false"),
]


@pytest.mark.parametrize(("fields", "param", "message"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    live: LiveServer, fields: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    for response in (live.complete(stream=stream, **fields), live.chat(stream=stream, **fields)):
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        assert message in error["message"]


def test_errors_of_tools(smollm: LiveServer) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}
    other = {"type": "function", "function": {"name": "other"}}
    for fields, param, message in (
        ({"tools": TOOLS, "tool_choice": other}, "tool_choice", "there is no tool 'other'"),
        ({"tools": TOOLS, "tool_choice": {"type": "x"}}, "tool_choice", "must be none, auto"),
        ({"tools": [bad], "tool_choice": "required"}, "tools", "tools is not valid"),
        ({"tool_choice": "required"}, "tool_choice", "`tools` must be set"),
    ):
        response = smollm.chat(**fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert message in response.json()["error"]["message"]


def test_a_grammar_that_takes_too_long(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = live.engine.engine.grammars
    monkeypatch.setattr(grammars, "config", StructuredOutputsConfig(grammar_time_limit=1e-6))
    choice = [f"{i} or {i + 1}" for i in range(4000)]
    response = live.complete(structured_outputs={"choice": choice})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "structured_outputs.choice"
    assert "takes more than 1e-06 seconds" in response.json()["error"]["message"]
