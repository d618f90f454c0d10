"""Answers that are sent as they grow, and clients that go away before the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from arctic_jax.serving.error_responses import as_api_error

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
]


class EventStream(Response):
    """Server-sent events: `data: JSON`, at the end `data: [DONE]`, also after an error.

    Nothing is made ahead of the client: an event is asked for when the one before is on its way,
    so that a slow reader keeps no more than the socket's buffer.

    Args:
        resources: entered for as long as the stream lasts.
        events: the JSON of each event; an exception becomes an event of its own.
    """

    def __init__(
        self, resources: AbstractAsyncContextManager[Any], events: AsyncIterator[str]
    ) -> None:
        super().__init__()
        self._resources = resources
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or as much as the client waits for."""
        async with self._resources:
            await _first_of(self._write(send), _disconnected(receive))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async with contextlib.aclosing(self._events) as events:  # pyright: ignore
                async for event in events:
                    await _send_event(send, event)
        except Exception as error:
            await _send_event(send, json.dumps(as_api_error(error).body))
        await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do some work for as long as the client waits for it.

    Raises:
        ClientDisconnect: it went away; the work was cancelled.
    """
    finished, result = await _first_of(work, _disconnected(request.receive))
    if not finished:
        raise ClientDisconnect
    return result


async def _send_event(send: Send, event: str) -> None:
    body = f"data: {event}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of[T](
    work: Coroutine[Any, Any, T], end: Coroutine[Any, Any, None]
) -> tuple[bool, Any]:
    """Run both until one ends; return whether it was the work, and its result."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(end)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done = tasks[0].done()
        return done, tasks[0].result() if done else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
