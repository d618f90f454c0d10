"""The endpoint: which path leads where. The app is made anew for each server; nothing is global."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from arctic_jax import __version__
from arctic_jax.serving import embeddings, error_responses
from arctic_jax.serving.chat import ChatCall
from arctic_jax.serving.chat_prompt import render
from arctic_jax.serving.completions import CompletionCall
from arctic_jax.serving.error_responses import APIError
from arctic_jax.serving.event_stream import EventStream, unless_disconnected
from arctic_jax.serving.limits import Limits
from arctic_jax.serving.metrics import Metrics
from arctic_jax.serving.middleware import ApiKeys, SizeLimits
from arctic_jax.serving.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)
from arctic_jax.serving.served_model import ServedModel
from arctic_jax.serving.tracing import Tracer, Tracing

CLIENT_GONE = 499  # nginx' number; nobody is there to read it
PIECE = 64 << 10  # bytes of a large answer that are sent at once


@dataclass(frozen=True)
class HttpOptions:
    """Who may ask, and how.

    Attributes:
        api_keys: one of them must come with every call; none for no guard.
        public_metrics: whether `/metrics` is open without a key, as `/health` is.
        max_header_bytes: of all headers of a call.
        body_timeout: seconds between two pieces of a body.
        allowed_origins: of web pages whose scripts may call; see CORS.
        allowed_methods: for them.
        allowed_headers: for them.
        allow_credentials: for them.
        tracer: sends a span of every call.
    """

    api_keys: Sequence[str] = ()
    public_metrics: bool = False
    max_header_bytes: int = 64 << 10
    body_timeout: float = 30.0
    allowed_origins: Sequence[str] = ()
    allowed_methods: Sequence[str] = ("*",)
    allowed_headers: Sequence[str] = ("*",)
    allow_credentials: bool = False
    tracer: Tracer | None = None


def build_app(model: ServedModel, metrics: Metrics, options: HttpOptions | None = None) -> FastAPI:
    """Make the app that answers for a model.

    Args:
        model: what answers.
        metrics: told of every request.
        options: of HTTP.
    """
    options = options or HttpOptions()
    middleware = guards(options, model.options.limits)
    if options.tracer is not None:  # innermost: who is not let in leaves no span
        middleware.append(Middleware(Tracing, tracer=options.tracer))
    app = FastAPI(
        title="arctic-jax",
        version=__version__,
        middleware=middleware,
        responses=error_responses.DOCUMENTED,
    )
    error_responses.install(app)
    _add_generation(app, model, metrics)
    _add_tokens(app, model)
    _add_status(app, model, metrics)
    return app


def guards(options: HttpOptions, limits: Limits) -> list[Middleware]:
    """Return what every call passes before it reaches a route, the outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=options.allowed_origins,
        allow_methods=options.allowed_methods,
        allow_headers=options.allowed_headers,
        allow_credentials=options.allow_credentials,
    )
    public = ["/health", *(["/metrics"] if options.public_metrics else [])]
    keys = Middleware(ApiKeys, keys=options.api_keys, public=public)
    sizes = Middleware(
        SizeLimits,
        max_header_bytes=options.max_header_bytes,
        max_bytes=limits.max_body_bytes,
        max_seconds=options.body_timeout,
    )
    # The first is CORS, so that also refusals can be read by scripts.
    return [*([cors] if options.allowed_origins else []), keys, sizes]


async def _only_json(request: Request) -> None:
    """Refuse other kinds of bodies, as a form of a foreign web page would send them."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "Unsupported Media Type: Only 'application/json' is allowed"
        raise APIError(400, message, kind="Bad Request")


JSON_BODY: Any = [Depends(_only_json)]
STREAMED: Any = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def _add_generation(app: FastAPI, model: ServedModel, metrics: Metrics) -> None:
    @app.post(
        "/v1/completions",
        dependencies=JSON_BODY,
        response_model=CompletionResponse,
        responses=STREAMED,
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        call = await CompletionCall.begin(model, metrics, body)
        return await _answer(call, body.stream, request)

    @app.post(
        "/v1/chat/completions",
        dependencies=JSON_BODY,
        response_model=ChatCompletionResponse,
        responses=STREAMED,
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        call = await ChatCall.begin(model, metrics, body)
        return await _answer(call, body.stream, request)

    @app.post("/v1/embeddings", dependencies=JSON_BODY, response_model=EmbeddingResponse)
    async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
        found = await unless_disconnected(request, embeddings.embed(model, metrics, body))
        return _json(found)

    @app.exception_handler(ClientDisconnect)
    async def say_nothing(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)


async def _answer(
    call: CompletionCall | ChatCall, stream: bool | None, request: Request
) -> Response:
    if stream:
        return EventStream(call.generation, call.events())
    async with call.generation:
        return _json(await unless_disconnected(request, call.response()))


def _json(answer: CompletionResponse | ChatCompletionResponse | EmbeddingResponse) -> Response:
    return _InPieces(answer.model_dump_json(), media_type="application/json")


class _InPieces(Response):
    """A body of which no more is sent before the client has taken what was sent.

    In one piece all of it would wait behind TLS, where nobody sees whether the client takes it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        start = {"type": "http.response.start", "status": self.status_code}
        await send(start | {"headers": self.raw_headers})
        for first in range(0, len(self.body), PIECE):
            piece = self.body[first : first + PIECE]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _add_tokens(app: FastAPI, model: ServedModel) -> None:
    @app.post("/tokenize", dependencies=JSON_BODY)
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        model.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(400, "Give either prompt or messages.", "prompt")
        special = body.add_special_tokens
        if body.prompt is not None:
            text, special = body.prompt, special is None or special
        else:
            text, special = await render(model, body, with_tools=True), bool(special)
        (encoded,) = await model.encode([text], add_special_tokens=special)
        tokens = encoded.token_ids
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=model.max_model_len,
            tokens=tokens,
            token_strs=model.tokenizer.convert_ids_to_tokens(tokens)
            if body.return_token_strs
            else None,
        )

    @app.post("/detokenize", dependencies=JSON_BODY)
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        model.check_model(body.model)
        size = model.tokenizer.vocab_size
        wrong = next((token for token in body.tokens if not 0 <= token < size), None)
        if wrong is not None:
            message = f"token id {str(wrong)[:100]} is not in the vocabulary of {size}"
            raise APIError(400, message, "tokens")
        return DetokenizeResponse(
            prompt=model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        )


def _add_status(app: FastAPI, model: ServedModel, metrics: Metrics) -> None:
    @app.get("/v1/models")
    async def list_models() -> ModelList:
        names = model.options.names
        length = model.max_model_len
        return ModelList(
            data=[
                ModelCard(id=name, root=model.name, created=model.created, max_model_len=length)
                for name in names
            ]
        )

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        return Response(status_code=200 if model.healthy else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": model.admission.num_calls}

    @app.get("/metrics", response_class=PlainTextResponse)
    def read_metrics() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
