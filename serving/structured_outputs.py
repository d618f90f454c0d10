"""The form that a call wants answers to have: `response_format`, `structured_outputs`, tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from arctic_jax.engine.grammar_compiler import WHITESPACE, GrammarCompiler
from arctic_jax.engine.grammar_matcher import Grammar
from arctic_jax.errors import InvalidRequestError
from arctic_jax.serving.error_responses import APIError
from arctic_jax.serving.protocol import ChatCompletionRequest, SamplingFields
from arctic_jax.serving.tool_parsers import ToolParser
from arctic_jax.structured_outputs import StructuredOutputsParams

_NAMES = {f.name for f in fields(StructuredOutputsParams)}
_OLD_NAMES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


async def structured_outputs(
    request: SamplingFields,
    grammars: GrammarCompiler,
    tool_parser: type[ToolParser] | None = None,
) -> StructuredOutputsParams | None:
    """Read what a call wants, and compile it, outside of the event loop.

    Args:
        request: the call.
        grammars: of the engine.
        tool_parser: if the answer has to be calls of tools, what reads them.

    Raises:
        APIError: it is none of the forms, or several.
        InvalidRequestError: see `GrammarCompiler`.
    """
    for name in _OLD_NAMES:
        if (request.model_extra or {}).get(name) is not None:
            raise APIError(400, f"{name} is not supported: use structured_outputs.", name)
    found = {
        "response_format": _of_response_format(request.response_format or {"type": "text"}),
        "structured_outputs": _of_structured_outputs(request.structured_outputs),
    }
    if tool_parser is not None and isinstance(request, ChatCompletionRequest):
        found["tools"] = StructuredOutputsParams(grammar=tool_grammar(request, tool_parser))
    given = [name for name, params in found.items() if params is not None]
    if not given:
        return None
    field, params = given[0], found[given[0]]
    if len(given) > 1:
        raise APIError(400, f"{given[1]} cannot be used together with {field}.", given[1])
    assert params is not None
    try:
        await compile_grammar(grammars, params)
    except InvalidRequestError as error:
        if field == "structured_outputs" or error.parameter is None:
            raise
        message = str(error).replace(error.parameter, field, 1)
        raise APIError(400, message, field) from error
    return params


async def compile_grammar(grammars: GrammarCompiler, params: StructuredOutputsParams) -> Grammar:
    """Compile a grammar while the event loop goes on; see `GrammarCompiler.compile`."""
    future = grammars.submit(params)
    waiting = asyncio.wrap_future(future)
    # It may fail after nobody waits any more.
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait([waiting], timeout=grammars.config.grammar_time_limit)
    return grammars.result(params, future)


def tool_grammar(request: ChatCompletionRequest, parser: type[ToolParser]) -> str:
    """Write a grammar, in Lark's notation, of one or several calls that `parser` reads.

    A named tool is called once, as is any if `parallel_tool_calls` is false.

    Raises:
        APIError: the tool that is named is not there, or a tool's parameters are no schema.
    """
    tools = [tool["function"] for tool in request.tools or ()]
    choice = request.tool_choice
    if isinstance(choice, Mapping):
        name = _named_tool(choice)
        tools = [tool for tool in tools if tool["name"] == name]
        if not tools:
            raise APIError(400, f"tool_choice: there is no tool {name!r:.100}.", "tool_choice")
    once = isinstance(choice, Mapping) or request.parallel_tool_calls is False
    before, after, between = (json.dumps(text, ensure_ascii=False) for text in parser.around_calls)
    lines = [
        f"start: call ({between} call)*" if not once else "start: call",
        f"call: {before} ({' | '.join(f'tool_{i}' for i in range(len(tools)))}) {after}",
    ]
    for i, tool in enumerate(tools):
        parameters = tool.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise APIError(400, f"tools[{i}]: parameters must be a JSON schema.", "tools")
        head = f'{{"name": {json.dumps(tool["name"])}, "{parser.arguments_key}": '
        schema = {"type": "object", **parameters, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        lines.append(f'tool_{i}: {json.dumps(head, ensure_ascii=False)} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: %json {json.dumps(schema, ensure_ascii=False)}")
    return "\n".join(lines)


def _named_tool(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        message = (
            "tool_choice must be none, auto, required, or "
            '{"type": "function", "function": {"name": ...}}.'
        )
        raise APIError(400, message, "tool_choice")
    return name


def _of_response_format(form: Mapping[str, Any]) -> StructuredOutputsParams | None:
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind != "json_schema":
        message = (
            "response_format.type must be text, json_object or json_schema, got "
            f"{str(kind)[:100]!r}."
        )
        raise APIError(400, message, "response_format")
    wanted = form.get("json_schema")
    if not isinstance(wanted, Mapping) or not isinstance(wanted.get("schema"), Mapping):
        message = "response_format.json_schema must be an object that has a schema."
        raise APIError(400, message, "response_format")
    if not isinstance(wanted.get("strict"), bool | None):
        message = "response_format.json_schema.strict must be true or false."
        raise APIError(400, message, "response_format")
    return StructuredOutputsParams(json=wanted["schema"])


def _of_structured_outputs(form: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    if form is None:
        return None
    unknown: Sequence[str] = [n for n, v in form.items() if n not in _NAMES and v]
    if unknown:
        message = f"structured_outputs.{unknown[0]:.100} is not supported."
        raise APIError(400, message, "structured_outputs")
    return StructuredOutputsParams(**{n: v for n, v in form.items() if n in _NAMES})
