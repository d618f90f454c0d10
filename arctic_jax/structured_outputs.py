"""What an answer has to look like, and how large a grammar may be. Vocabulary; host only, no jax.

Names are vLLM's. What is checked here does not need the grammar to be understood; that is the work
of `engine/grammar_compiler.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Protocol

from arctic_jax.errors import InvalidRequestError

KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form of an answer: exactly one of the first five.

    Attributes:
        json: a JSON schema, as a mapping or as its text.
        regex: a regular expression that the whole answer matches (Rust's syntax, no look-around).
        choice: strings, one of which is the answer.
        grammar: a context-free grammar, in Lark's or in llama.cpp's (GBNF) notation.
        json_object: any JSON object.
        disable_any_whitespace: JSON without spaces and line breaks between its parts.
    """

    # In vLLM's order.
    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        """Check types, and that there is one form.

        Raises:
            InvalidRequestError: with the field's name and value.
        """
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = f"exactly one of {', '.join(KINDS)}"
            refuse("", f"must have {what}, got {', '.join(given) or 'none'}")
        if not isinstance(self.json, str | Mapping | None):
            refuse("json", "must be a JSON schema, as an object or as text", self.json)
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                refuse(name, "must be text", getattr(self, name))
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                refuse(name, "must be true or false", getattr(self, name))
        if self.choice is not None:
            if not isinstance(self.choice, list | tuple) or not self.choice:
                refuse("choice", "must be a list of strings, and not empty", self.choice)
            if any(not isinstance(text, str) or not text for text in self.choice):
                refuse("choice", "must hold non-empty strings", self.choice)

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


@dataclass(frozen=True)
class StructuredOutputsConfig:
    """Bounds on the grammars that users bring."""

    max_grammar_size: int = 64 << 10
    """Characters of a schema, a regular expression, a grammar, or of all choices."""
    max_schema_depth: int = 32
    """Objects and arrays within each other in a JSON schema."""
    grammar_time_limit: float = 5.0
    """Seconds for compiling one."""
    mask_time_limit: float = 1.0
    """Seconds for computing which tokens may come next."""
    grammar_cache_size: int = 128
    """Compiled grammars that are kept for the next request that brings the same."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = int | float if f.name.endswith("time_limit") else int
            if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"{f.name} must be a positive number, got {value!r}")


class GrammarMatcher(Protocol):
    """Follows one request's output along its grammar."""

    def accept(self, token: int) -> bool:
        """Take the next token; return whether the answer is complete and nothing may follow.

        Raises:
            ValueError: the grammar does not allow the token, or has become too complex.
        """
        ...

    def allowed_prefix(self, tokens: Sequence[int]) -> int:
        """Return how many of the tokens may come next, one after the other; perhaps too few."""
        ...

    def prepare(self, draft: Sequence[int]) -> None:
        """Begin to compute the masks of the next token, and of those after each of a draft's."""
        ...

    @property
    def ready(self) -> bool:
        """Whether nobody has to wait for the masks that `prepare` has begun."""
        ...

    @property
    def seconds(self) -> float:
        """For how long its masks are being computed; 0 if they are done, or not begun."""
        ...

    def wait(self, seconds: float) -> bool:
        """Wait for the masks; return `ready`."""
        ...

    def cancel(self) -> None:
        """Compute nothing that was not begun: the request has ended."""
        ...


def refuse(kind: str, why: str, value: object = None) -> NoReturn:
    """Raise the error that names a field of `StructuredOutputsParams`; `""` for all of them."""
    name = f"structured_outputs.{kind}" if kind else "structured_outputs"
    got = "" if value is None else f", got {value!r:.200}"
    raise InvalidRequestError(f"{name} {why}{got}.", name)
