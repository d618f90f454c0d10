"""Tools and reasoning found in answers, wherever the pieces are cut."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from arctic_jax.serving import reasoning_parsers, tool_parsers

WEATHER = {"name": "weather", "arguments": {"city": 'Zürich </tool> {"}'}}
TIME = {"name": "time", "arguments": {}}


def call(value: object) -> str:
    return f"<tool_call>\n{json.dumps(value)}\n</tool_call>"


HERMES: list[tuple[str, str, list[object]]] = [
    ("no call at all", "no call at all", []),
    ("a < b <tool", "a < b <tool", []),
    (call(WEATHER), "", [WEATHER]),
    ("Let me see.\n" + call(WEATHER) + "\n" + call(TIME), "Let me see.\n", [WEATHER, TIME]),
    (call(TIME) + "\nand more", "and more", [TIME]),
    (call(TIME)[: -len("\n</tool_call>")], "", [TIME]),
    ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    ('<tool_call>{"name": "half', '<tool_call>{"name": "half', []),
    (call([1]) + call(TIME), call([1]), [TIME]),
]


def llama(value: dict[str, object]) -> str:
    return json.dumps({"name": value["name"], "parameters": value["arguments"]})


LLAMA: list[tuple[str, str, list[object]]] = [
    ("no call at all", "no call at all", []),
    ("", "", []),
    (llama(WEATHER), "", [WEATHER]),
    ("<|python_tag|>" + llama(WEATHER), "", [WEATHER]),
    ("\n " + llama(WEATHER) + "; " + llama(TIME), "", [WEATHER, TIME]),
    ('{"answer": 42}', '{"answer": 42}', []),
    ('{"name": "half', '{"name": "half', []),
    ("<|python", "<|python", []),
    ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("{not JSON} at all", "{not JSON} at all", []),
]


def cuts(text: str) -> Iterator[list[str]]:
    """The text whole, by characters, and in two and three pieces at every position."""
    yield [text]
    yield list(text)
    yield from ([text[:i], text[i:]] for i in range(len(text) + 1))
    for i, j in itertools.combinations(range(0, len(text), 3), 2):
        yield [text[:i], text[i:j], text[j:]]


def parse_tools(parser: tool_parsers.ToolParser, pieces: list[str]) -> tuple[str, list[Any]]:
    found = [parser.push(piece) for piece in pieces] + [parser.finish()]
    calls = [one for _, some in found for one in some]
    assert [one.index for one in calls] == list(range(len(calls)))
    assert len({one.id for one in calls}) == len(calls) == parser.num_calls
    values = [
        {"name": one.function.name, "arguments": json.loads(one.function.arguments)}
        for one in calls
    ]
    return "".join(content for content, _ in found), values


@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [("hermes", *case) for case in HERMES] + [("llama3_json", *case) for case in LLAMA],
)
def test_tools(kind: str, text: str, content: str, calls: list[object]) -> None:
    for pieces in cuts(text):
        assert parse_tools(tool_parsers.PARSERS[kind](), pieces) == (content, calls), pieces


def test_text_before_a_call_is_not_held_back() -> None:
    parser = tool_parsers.HermesToolParser()
    assert parser.push("Let me see. <")[0] == "Let me see. "
    assert parser.push("b> is bold.")[0] == "<b> is bold."


REASONING = [
    # parser, prompt, text, reasoning, content
    ("qwen3", "", "<think>\nhm\n</think>\n\nyes", "\nhm\n", "\n\nyes"),
    ("qwen3", "", "\n <think>hm</think>yes", "hm", "yes"),
    ("qwen3", "", "yes", "", "yes"),
    ("qwen3", "", "<thin air", "", "<thin air"),
    ("qwen3", "", "yes <think>", "", "yes <think>"),
    ("qwen3", "", "<think>for ever <", "for ever <", ""),
    ("qwen3", "...<think>\n\n</think>\n\n", "yes", "", "yes"),
    ("qwen3", "...<think>\n", "hm</think>yes", "hm", "yes"),
    ("qwen3", "what is <think>? <|assistant|>", "a tag", "", "a tag"),
    ("deepseek_r1", "", "hm</think>yes", "hm", "yes"),
    ("deepseek_r1", "", "<think>hm</think>yes", "hm", "yes"),
    ("deepseek_r1", "", "hm", "hm", ""),
    ("deepseek_r1", "", "", "", ""),
    ("deepseek_r1", "...<think>\n", "hm </thin </think> yes</think>", "hm </thin ", " yes</think>"),
]


@pytest.mark.parametrize(("kind", "prompt", "text", "reasoning", "content"), REASONING)
def test_reasoning(kind: str, prompt: str, text: str, reasoning: str, content: str) -> None:
    for pieces in cuts(text):
        parser = reasoning_parsers.PARSERS[kind](prompt)
        found = [parser.push(piece) for piece in pieces] + [parser.finish()]
        assert "".join(part for part, _ in found) == reasoning, pieces
        assert "".join(part for _, part in found) == content, pieces
