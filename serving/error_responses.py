"""Errors as OpenAI's clients expect them: a status and `{"error": {message, type, param, code}}`.

Messages name the field and its value; they hold no file paths, addresses or tracebacks.
"""

from __future__ import annotations

import http
import json
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from arctic_jax.errors import EngineDeadError, InvalidRequestError

MAX_ENTRIES = 10  # of a validation error; a body of kilobytes can be wrong in millions of places
MAX_INPUT = 200
MAX_ENTRY = 1000
BUSY = (
    "The engine is currently busy and cannot accept new requests. Please try again later or on a "
    "different instance."
)
_PATH = re.compile(r"(?<![\w.:/])(?:/[\w.+-]+){2,}")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
_TRACE = re.compile(r"\bTraceback \(most recent call last\).*", re.DOTALL)


class APIError(HTTPException):
    """What a client is told instead of an answer.

    Args:
        status: of the HTTP response.
        message: for the client's user.
        param: the field that is at fault, if one is.
        kind: the error's `type`; by default the one that goes with the status.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.param = param
        self.kind = kind or _KINDS[status]
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """What is sent, as JSON or as an event of a stream."""
        message = sanitized(self.detail)
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}


_KINDS = {
    400: "BadRequestError",
    404: "NotFoundError",
    413: "Request Entity Too Large",
    500: "InternalServerError",
    503: "Service Unavailable",
}


class ErrorDetail(BaseModel):
    """What is wrong, and where."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What was asked is wrong, or not there."},
    "5XX": {"model": ErrorResponse, "description": "Too much waits, or the engine has failed."},
}
"""Errors of every path, for the OpenAPI document."""


def sanitized(message: str) -> str:
    """Take out what is none of a client's business, and what UTF-8 cannot say."""
    message = _TRACE.sub("", message)
    message = _ADDRESS.sub("0x…", _PATH.sub("…", message))
    return message.encode("utf-8", "replace").decode()


def as_api_error(error: Exception) -> APIError:
    """Say what any exception means for the client."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, InvalidRequestError):
        message = str(error)
        if error.parameter is not None and error.value is not None:
            message += f" (parameter={error.parameter}, value={error.value!r:.{MAX_INPUT}})"
        return APIError(400, message, error.parameter)
    if isinstance(error, EngineDeadError):
        return APIError(500, f"the engine does not answer any more: {error}")
    return APIError(500, "an internal error has occurred; the server's log has more")


def error_response(error: APIError) -> Response:
    """Make the response of an error."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    body = json.dumps(error.body)
    return Response(body, error.status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Let an app answer with these errors only."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error))

    async def answer_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_validation_error(error.errors()))

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = http.HTTPStatus(error.status_code).phrase
        return error_response(APIError(error.status_code, str(error.detail), kind=phrase))

    for kind in (APIError, InvalidRequestError, EngineDeadError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)


def _validation_error(errors: Any) -> APIError:
    """Sum up what pydantic found wrong."""
    entries = [_entry(error) for error in errors[:MAX_ENTRIES]]
    if len(errors) > MAX_ENTRIES:
        entries.append(f"... and {len(errors) - MAX_ENTRIES} more")
    noun = "error" if len(errors) == 1 else "errors"
    message = f"{len(errors)} validation {noun}:\n" + "\n".join(entries)
    return APIError(400, message, _field(errors[0]) if errors else None, kind="Bad Request")


def _field(error: dict[str, Any]) -> str:
    return ".".join(str(part)[:MAX_INPUT] for part in error["loc"])[:MAX_INPUT]


def _entry(error: dict[str, Any]) -> str:
    value = error.get("input")
    if isinstance(value, str):
        value = value[:MAX_INPUT]
    # Of a list or an object only what it is: it may be deep, or hold everything that was sent.
    shown = repr(value) if isinstance(value, str | float | bool | None) else type(value).__name__
    if isinstance(value, int) and not isinstance(value, bool):
        shown = str(value) if abs(value) < 10**MAX_INPUT else "a huge integer"
    return f"  {_field(error)}: {error['msg']} (input: {shown[:MAX_INPUT]})"[:MAX_ENTRY]
