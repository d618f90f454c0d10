"""Takes the reasoning out of an answer as it comes: what a model thinks between two tags.

A parser is one answer's; it is fed pieces of text, cut anywhere.
"""

from __future__ import annotations

from typing import ClassVar


class ReasoningParser:
    """Splits text at `<think>` and `</think>`.

    Args:
        prompt: the text that the answer continues; a template may have opened the reasoning, or
            closed it for good.
    """

    starts_reasoning: ClassVar[bool] = False
    """Whether an answer is reasoning from its beginning, unless its prompt says otherwise."""
    start: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"

    def __init__(self, prompt: str = "") -> None:
        opened, closed = prompt.rfind(self.start), prompt.rfind(self.end)
        # Only what the template has put at the very end belongs to this answer.
        ends_open = opened > closed and not prompt[opened + len(self.start) :].strip()
        ends_closed = closed > opened and not prompt[closed + len(self.end) :].strip()
        self._reasoning = ends_open or (self.starts_reasoning and not ends_closed)
        self._may_start = not ends_closed
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Take text; return what is certain by now of the reasoning and of the answer."""
        self._held += text
        reasoning = content = ""
        if self._may_start and not self._skip_start():
            return "", ""
        if self._reasoning:
            reasoning, found, rest = self._held.partition(self.end)
            if found:
                self._reasoning, self._held = False, rest
            else:
                keep = held_back(reasoning, self.end)
                self._held = reasoning[len(reasoning) - keep :]
                reasoning = reasoning[: len(reasoning) - keep]
        if not self._reasoning:
            content, self._held = self._held, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """Return what was held back, the answer having ended."""
        held, self._held = self._held, ""
        return (held, "") if self._reasoning else ("", held)

    def _skip_start(self) -> bool:
        """Drop the tag that opens the reasoning; return whether it is known if it is there."""
        text = self._held.lstrip()
        if text.startswith(self.start):
            self._reasoning, self._held = True, text[len(self.start) :]
        elif self.start.startswith(text):
            return False
        self._may_start = False
        return True


class Qwen3ReasoningParser(ReasoningParser):
    """Qwen3 opens its reasoning itself, or answers without any."""


class DeepSeekR1ReasoningParser(ReasoningParser):
    """DeepSeek-R1 and its distillates begin with reasoning and only close it."""

    starts_reasoning = True


PARSERS: dict[str, type[ReasoningParser]] = {
    "deepseek_r1": DeepSeekR1ReasoningParser,
    "qwen3": Qwen3ReasoningParser,
}


def held_back(text: str, tag: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
