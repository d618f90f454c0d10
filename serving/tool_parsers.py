"""Takes the calls of tools out of an answer as it comes.

A parser is one answer's; it is fed pieces of text, cut anywhere. A call is handed out when it is
complete: half a call helps nobody, and what turns out to be none stays text.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from arctic_jax.serving.protocol import FunctionCall, ToolCall
from arctic_jax.serving.reasoning_parsers import held_back


class ToolParser:
    """Finds calls in the text of one answer.

    Attributes:
        around_calls: what is written before and after a call, and between two.
        arguments_key: under which a call has its arguments.
    """

    around_calls: ClassVar[tuple[str, str, str]]
    arguments_key: ClassVar[str]

    def __init__(self) -> None:
        self._held = ""
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take text; return what is certain by now: text without calls, and whole calls."""
        raise NotImplementedError

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return what was held back, the answer having ended."""
        held, self._held = self._held, ""
        return held, []

    def _call(self, found: Any) -> ToolCall | None:
        """Make a call of parsed JSON, if it is one."""
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get("arguments", found.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.num_calls += 1
        function = FunctionCall(name=found["name"], arguments=arguments)
        return ToolCall(function=function, index=self.num_calls - 1)


class HermesToolParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3."""

    start = "<tool_call>"
    end = "</tool_call>"
    around_calls = "<tool_call>\n", "\n</tool_call>", "\n"
    arguments_key = "arguments"
    _after_call = False  # where line breaks separate calls, and are no answer

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """See `ToolParser`."""
        self._held += text
        content, calls = "", []
        while True:
            before, found, after = self._held.partition(self.start)
            if not found:
                keep = held_back(before, self.start)
                self._held = before[len(before) - keep :]
                return content + self._visible(before[: len(before) - keep]), calls
            content, self._held = content + self._visible(before), found + after
            inside, found, rest = after.partition(self.end)
            if not found:
                return content, calls
            call = self._parse(inside)
            if call is None:
                content += self._visible(self.start + inside + self.end)
            else:
                calls.append(call)
                self._after_call = True
            self._held = rest

    def _visible(self, text: str) -> str:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        """See `ToolParser`; a last call may lack its end."""
        call = None
        if self._held.startswith(self.start):
            call = self._parse(self._held[len(self.start) :])
        if call is None:
            return super().finish()
        self._held = ""
        return "", [call]

    def _parse(self, text: str) -> ToolCall | None:
        try:
            return self._call(json.loads(text))
        except (ValueError, RecursionError):
            return None


class Llama3JsonToolParser(ToolParser):
    """`{"name": ..., "parameters": {...}}`, several with `;` between them: Llama 3.1 to 3.3.

    An answer is calls if it begins with a brace, and text otherwise.
    """

    tag = "<|python_tag|>"
    around_calls = "", "", "; "
    arguments_key = "parameters"

    def __init__(self) -> None:
        super().__init__()
        self._state = "start"  # then "calls" or "text"
        self._depth = self._scanned = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """See `ToolParser`."""
        self._held += text
        if self._state == "start" and not self._decide():
            return "", []
        if self._state == "text":
            content, self._held = self._held, ""
            return content, []
        calls = []
        while (end := self._object_end()) is not None:
            call = self._parse(self._held[:end])
            if call is None:  # it is JSON of another kind, and the answer
                self._state = "text"
                content, self._held = self._held, ""
                return content, calls
            calls.append(call)
            self._held, self._scanned = self._held[end:], 0
        return "", calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """See `ToolParser`."""
        content, calls = super().finish()
        return content if content.strip(" \n;") else "", calls

    def _decide(self) -> bool:
        text = self._held.lstrip()
        if self.tag.startswith(text):  # also if nothing has come yet
            return False
        self._state = "calls" if text.removeprefix(self.tag).lstrip()[:1] == "{" else "text"
        if text == self.tag or (text.startswith(self.tag) and not text[len(self.tag) :].strip()):
            self._state = "start"
            return False
        return True

    def _object_end(self) -> int | None:
        """Read on, every character once; return where the first object ends, if it does."""
        for i in range(self._scanned, len(self._held)):
            c = self._held[i]
            if self._in_string:
                self._in_string = self._escaped or c != '"'
                self._escaped = c == "\\" and not self._escaped
            elif c == '"':
                self._in_string = self._depth > 0
            elif c == "{":
                self._depth += 1
            elif c == "}" and self._depth:
                self._depth -= 1
                if not self._depth:
                    return i + 1
        self._scanned = len(self._held)
        return None

    def _parse(self, text: str) -> ToolCall | None:
        text = text.lstrip(" \n;").removeprefix(self.tag)
        try:
            return self._call(json.loads(text))
        except (ValueError, RecursionError):
            return None


PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesToolParser,
    "llama3_json": Llama3JsonToolParser,
    "qwen": HermesToolParser,
}
