"""What every call passes before it reaches a route: keys, size and time of its body. Plain ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arctic_jax.serving.error_responses import APIError, error_response


class ApiKeys:
    """Lets calls with one of the keys through, and `public` paths; others get a 401.

    Every other path is guarded, those that do not exist included. A browser's preflight (OPTIONS)
    cannot carry a key and passes.

    Args:
        app: what is guarded.
        keys: any of them opens; none at all means that there is no guard.
        public: paths that need no key, exactly as written here.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], public: Iterable[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one call."""
        if scope["type"] == "http" and self._digests and not self._may_pass(scope):
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS" or scope["path"] in self._public:
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All of them, whichever fits: the time must not tell which one was nearly right.
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(fits)


class SizeLimits:
    """Refuses headers that are too large, and bodies that are too large or too slow.

    Args:
        app: what is guarded.
        max_header_bytes: of all headers.
        max_bytes: of a body.
        max_seconds: between two pieces of a body.
    """

    def __init__(
        self, app: ASGIApp, max_header_bytes: int, max_bytes: int, max_seconds: float
    ) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The parser stops at such headers, too, but only if they come in more than one piece.
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_header_bytes:
            most = self._max_header_bytes
            error = APIError(400, f"the request's headers are larger than {most} bytes")
            await self._refuse(error, scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._max_bytes):
            await self._refuse(self._too_large(), scope, receive, send)
            return
        size, complete, started = 0, False, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # from here on it tells of the client's going
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._max_seconds)
            except TimeoutError:
                raise APIError(400, "the request's body did not arrive in time") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._max_bytes:
                raise self._too_large()
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, limited, noted)
        except APIError as error:
            if started:
                raise
            await error_response(error)(scope, receive, send)

    def _too_large(self) -> APIError:
        return APIError(413, f"the request's body is larger than {self._max_bytes} bytes")

    async def _refuse(self, error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(error)
        response.headers["connection"] = "close"  # its body is not read
        await response(scope, receive, send)
