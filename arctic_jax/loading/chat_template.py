"""Renders chat templates under limits of time, memory and size. Any thread may call; host only.

A chat template is a program that comes with the weights, often from a stranger. Limits inside the
interpreter can be walked around (one multiplication, one `replace`, one `center` is a single call
that nothing interrupts), so templates run in a child process that holds nothing of value and that
can be killed. It is started once and kept; a render through it costs a fraction of a millisecond.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arctic_jax.errors import ChatTemplateError

_WORKER = Path(__file__).with_name("chat_template_worker.py")
_LENGTH = struct.Struct("<Q")
_START_LIMIT = 60.0  # seconds for Python to start and to import Jinja on a busy machine
# Names under which models' authors pass a message's reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What Python needs to start. Tokens and keys in the environment are none of a template's business.
_ENVIRONMENT = (
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "LANG",
    "LC_ALL",
    "TZ",
)
# Put behind a message that is to be continued; the text is cut there. The space tells whether the
# template trims.
_CUT = "~~to be continued from here~~ "


class ChatTemplateRenderer:
    """Owns the process that renders. `close()`, or forgetting the object, ends it."""

    def __init__(
        self,
        time_limit: float = 5.0,
        memory_limit: int = 512 << 20,
        size_limit: int = 4_000_000,
    ) -> None:
        self.time_limit = time_limit
        self.memory_limit = memory_limit
        self.size_limit = size_limit
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation; `continue_final_message` leaves its last turn open.

        Raises:
            ChatTemplateError: the template is faulty, raises, or exceeds a limit; or the messages
                are not plain data (texts, numbers, lists and mappings).
        """
        plain = [_message(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise ChatTemplateError(
                    "continue_final_message and add_generation_prompt exclude each other",
                    "continue_final_message",
                )
            if not plain or not isinstance(plain[-1].get("content"), str):
                raise ChatTemplateError(
                    "continue_final_message needs a last message with text", "messages"
                )
            plain[-1]["content"] += _CUT
        variables |= {
            "messages": plain,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            body = json.dumps({"template": template, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"messages must be plain data: {error}", "messages") from error
        with self._lock:
            reply = self._ask(body)
        if "error" in reply:
            raise ChatTemplateError(f"the chat template failed: {reply['error']}", "messages")
        text = reply["text"]
        if continue_final_message:
            text, found, rest = text.rpartition(_CUT.rstrip())
            if not found:
                raise ChatTemplateError("the template does not show the last message", "messages")
            if not rest.startswith(" "):  # the template trims messages: trim what remains likewise
                text = text.rstrip()
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ChatTemplateError("the messages hold a lone surrogate", "messages")
        return text

    def close(self) -> None:
        """End the process; the next `render` starts another."""
        with self._lock:
            self._stop()

    def _ask(self, body: bytes) -> dict[str, Any]:
        process = self._process or self._start()
        try:
            if process.stdin is None:
                raise EOFError
            process.stdin.write(_LENGTH.pack(len(body)) + body)
            process.stdin.flush()
            reply = self._receive(process, self.time_limit)
            if "last" in reply:
                self._stop()
            return reply
        except TimeoutError as error:
            self._stop()
            raise ChatTemplateError(
                f"the chat template took more than {self.time_limit:g} s", "messages"
            ) from error
        except (OSError, EOFError, ValueError, KeyError) as error:
            self._stop()
            raise ChatTemplateError("the chat template crashed its process", "messages") from error
        except BaseException:  # an interrupt leaves an unread reply behind
            self._stop()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        limits = [str(self.time_limit), str(self.memory_limit), str(self.size_limit)]
        # -P: the worker's folder is ours, and names in it must not shadow anyone's modules.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        try:
            self._receive(process, _START_LIMIT)
        except (TimeoutError, EOFError, ValueError) as error:
            self._stop()
            raise RuntimeError("the process that renders chat templates did not start") from error
        return process

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _receive(self, process: subprocess.Popen[bytes], limit: float) -> dict[str, Any]:
        if process.stdout is None:
            raise EOFError
        pipe = process.stdout.fileno()
        deadline = time.monotonic() + limit
        (length,) = _LENGTH.unpack(_read(pipe, _LENGTH.size, deadline))
        if length > 12 * self.size_limit + 10_000:  # JSON may spell a character in 12 bytes
            raise ValueError(f"a reply of {length} bytes")
        return json.loads(_read(pipe, length, deadline))


def _read(pipe: int, count: int, deadline: float) -> bytes:
    parts = bytearray()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(parts) < count:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
        part = os.read(pipe, count - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # an unsent request was still buffered
                pipe.close()


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drop absent fields, which templates test by presence; name reasoning as templates do."""
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"a message must be a mapping, got {message!r:.100}", "messages")
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain
