"""Renders chat templates; a process of its own, started by `loading/chat_template.py`.

Never imported: it is run by its path and imports nothing of ours, so that it starts in a tenth of a
second. A template is a program from the same place as the weights. Jinja's sandbox keeps it away
from Python's internals; the limits of this process bound its memory, and the parent's clock kills
what does not end. Whatever the template does, it does it here.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import jinja2
from jinja2 import ext, nodes, sandbox, utils

_LENGTH = struct.Struct("<Q")


class _Generation(ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(utils.Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _refuse_private(name)
        utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _environment() -> sandbox.ImmutableSandboxedEnvironment:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))


def _receive(stream: BinaryIO) -> bytes | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None  # the parent closed the pipe, or is gone
    (count,) = _LENGTH.unpack(head)
    body = stream.read(count)
    return body if len(body) == count else None


def _send(stream: BinaryIO, reply: dict[str, Any]) -> None:
    body = json.dumps(reply).encode()
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def main(time_limit: float, memory_limit: int, size_limit: int) -> None:
    """Answer requests from standard input until it is closed."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.dup2(2, 1)  # nothing but replies reaches the parent
    compile_template = functools.lru_cache(8)(_environment().from_string)
    _limit(resource.RLIMIT_AS, memory_limit)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _send(replies, {"ready": True})
    while (body := _receive(requests)) is not None:
        # If the parent is killed meanwhile, nobody else would end an endless template.
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = usage.ru_utime + usage.ru_stime
        _limit(resource.RLIMIT_CPU, int(used + time_limit) + 2)
        try:
            request = json.loads(body)
            pieces: list[str] = []
            size = 0
            for piece in compile_template(request["template"]).generate(**request["variables"]):
                size += len(piece)
                if size > size_limit:
                    raise jinja2.exceptions.TemplateError(
                        f"its output exceeds {size_limit} characters"
                    )
                pieces.append(piece)
            _send(replies, {"text": "".join(pieces)})
        except MemoryError:
            pieces = []
            # A process that ran out of memory is not used again.
            text = f"it needs more than {memory_limit >> 20} MiB of memory"
            _send(replies, {"error": text, "last": True})
            return
        except Exception as error:
            # Of a template's own error only the message matters to whoever wrote the messages.
            kind = "" if type(error) is jinja2.exceptions.TemplateError else type(error).__name__
            text = f"{kind}: {error}" if kind else str(error)
            _send(replies, {"error": text[:1000]})


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
