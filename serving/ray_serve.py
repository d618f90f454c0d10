"""The server as an application of Ray Serve: engines as replicas, anywhere in a Ray cluster.

    serve run arctic_jax.serving.ray_serve:build_app model=smollm2-135m-instruct num_replicas=2

`Engine` replicas each hold the whole app of `server.py`. `Ingress` stands before them: it knows
nothing of the API, hands each call to a replica, and hands it to another one if the replica dies
before the first byte of its answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import replace
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arctic_jax.config import EngineConfig
from arctic_jax.errors import EngineDeadError
from arctic_jax.serving import lifecycle
from arctic_jax.serving.error_responses import APIError, as_api_error, error_response
from arctic_jax.serving.serve import Settings, settings_of
from arctic_jax.serving.served_model import ServedModel
from arctic_jax.serving.server import build_app as build_server
from arctic_jax.serving.server import guards

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told not to

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Replicas that a call is handed to. It may be the call that kills them."""
LAST_WORDS = 5.0
"""Seconds for the ends of streams to be read, after which a replica is killed."""
INGRESS_CALLS = 100_000
"""That one ingress has open at a time. The engines' own limits come long before."""
_OF_THE_DEPLOYMENT = (
    "num_replicas",
    "max_replicas_per_node",
    "max_ongoing_requests",
    "max_queued_requests",
    "autoscaling_config",
    "ray_actor_options",
    "graceful_shutdown_timeout_s",
    "health_check_period_s",
    "health_check_timeout_s",
    "logging_config",
)
_OF_THE_PROXY = (
    "host",
    "port",
    "uds",
    "headless",
    "keep_alive_timeout",
    "write_timeout",
    "uvicorn_log_level",
    "access_log",
)
_SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "headers", "client", "server"),
)


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """Make the application, for `serve run`, `serve deploy` and `serve.run`.

    Args:
        args: options of `arctic-jax serve` by their names, with dashes or underscores. Beside them
            options of `serve.deployment` for the engines (`num_replicas`, `autoscaling_config`,
            `ray_actor_options`, ...), `num_gpus` of a replica (by default its devices; 0 for
            CPUs), and `num_ingress_replicas` (1). Values may be text, as `serve run` gives them.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    options = {name.replace("-", "_"): value for name, value in args.items()}
    own = {n: _value(options.pop(n)) for n in _OF_THE_DEPLOYMENT if n in options}
    num_gpus = _value(options.pop("num_gpus", None))
    num_ingress = _value(options.pop("num_ingress_replicas", 1))
    for name in options:
        if name in _OF_THE_PROXY or name.startswith("ssl_"):
            raise ValueError(f"{name}: Ray Serve's proxy listens, see its http_options")
    settings = settings_of(options)
    if settings.engine["nnodes"] > 1:
        raise ValueError("nnodes: a replica has the GPUs of one machine")
    engines = serve.deployment(**_engine_options(settings, own, num_gpus))(Engine).bind(settings)
    ingress = serve.deployment(
        num_replicas=num_ingress,
        max_ongoing_requests=INGRESS_CALLS,
        ray_actor_options={"num_cpus": 0},  # it passes bytes on
        graceful_shutdown_timeout_s=settings.shutdown_timeout + 2 * LAST_WORDS,
    )
    return ingress(Ingress).bind(settings, engines)


def _engine_options(settings: Settings, own: dict[str, Any], num_gpus: Any) -> dict[str, Any]:
    """Return the options of the engines' deployment: what the user says, and our defaults.

    Ray's own would let 5 calls into an engine that computes hundreds at once.
    """
    config = EngineConfig.from_keywords(**settings.engine)
    replicas = config.parallel.data_parallel_size
    if num_gpus is None:
        num_gpus = replicas * config.parallel.num_devices
    actor = {"num_gpus": num_gpus} | (own.get("ray_actor_options") or {})
    places = config.scheduler.limits("gpu" if actor["num_gpus"] else "cpu").max_num_seqs * replicas
    options: dict[str, Any] = {
        # As many wait as run: the next step never lacks a request, and others find another replica.
        "max_ongoing_requests": 2 * places,
        "max_queued_requests": settings.served.limits.max_num_queued_reqs,
        "graceful_shutdown_timeout_s": settings.shutdown_timeout + LAST_WORDS,
        "health_check_period_s": 5.0,
        **own,
        "ray_actor_options": actor,
    }
    automatic = options.get("num_replicas") == "auto"
    if automatic or "autoscaling_config" in options:
        given = dict(options.get("autoscaling_config") or {})
        options["autoscaling_config"] = {"target_ongoing_requests": places} | given
    return options


def _value(text: Any) -> Any:
    """Read what `serve run` gives as text: `2`, `auto`, `{num_cpus: 4}`."""
    return yaml.safe_load(text) if isinstance(text, str) else text


class Engine:
    """A replica: an engine and its server, without a socket.

    Args:
        settings: of the server.
    """

    async def __init__(self, settings: Settings) -> None:  # pyright: ignore
        self._engine = await asyncio.to_thread(lifecycle.load, settings.engine)
        self._model = ServedModel(self._engine, settings.served)
        self._metrics = lifecycle.measure(self._model, settings.metrics_prefix)
        http = replace(settings.http, tracer=settings.tracer())
        self._app = build_server(self._model, self._metrics, http)
        if self._model.generates:
            watch = lifecycle.watch(self._model.engine, settings.step_timeout)
            self._watch = asyncio.create_task(watch)

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Let the app answer a call, and yield the messages of its response.

        Raises:
            EngineDeadError: instead of the app's saying so, so that another replica may answer.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue(1)  # the app waits for its reader
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not request:
                await asyncio.Event().wait()  # a client that goes away cancels this call
            return request.pop()

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message.get("status", 200) >= 500 and not self._engine_lives:
                    raise EngineDeadError("it has failed or was shut down")
                yield message
            await task  # what the app could not answer for
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def figures(self) -> tuple[str, str]:
        """Return this replica's name and its metrics, in Prometheus' text format."""
        name = serve.get_replica_context().replica_tag
        return name, self._metrics.exposition().decode()

    async def check_health(self) -> None:
        """Return if the engine lives; Ray replaces the replica otherwise.

        Raises:
            EngineDeadError: it has failed, or a step has taken too long.
        """
        if not self._engine_lives:
            raise EngineDeadError("it has failed or was shut down")

    @property
    def _engine_lives(self) -> bool:
        return not self._engine.dead

    def __del__(self) -> None:
        """End the engine; Ray has waited for the calls before."""
        if hasattr(self, "_engine"):  # it may never have been loaded
            lifecycle.stop(self._engine)


@serve.ingress()
class Ingress:
    """Hands calls to engines.

    Args:
        settings: of the server.
        engines: the replicas.
    """

    def __init__(self, settings: Settings, engines: DeploymentHandle) -> None:
        self._settings = settings
        self._engines = engines.options(method_name="answer", stream=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return what Ray's proxies call."""
        return Starlette(
            routes=[Route("/metrics", self._measure), Mount("", self._answer)],
            middleware=guards(self._settings.http, self._settings.served.limits),
        )

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        answer = asyncio.create_task(self._from_any(scope, body, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            for task in (answer, leaving):
                task.cancel()
            await asyncio.gather(answer, leaving, return_exceptions=True)

    async def _from_any(self, scope: Scope, body: bytes, send: Send) -> None:
        """Pass the answer of a replica on; of another one if it dies before it has begun."""
        call = {name: scope[name] for name in _SCOPE if name in scope}
        for attempt in range(1, MAX_ATTEMPTS + 1):
            stream = _Stream(send)
            response: Any = self._engines.remote(call, body)
            try:
                async for message in response:
                    await stream.send(message)
                return
            except BackPressureError as error:
                busy = APIError(503, str(error), retry_after=1)
                await error_response(busy)(scope, _nothing, send)
                return
            except (RayError, RayServeException) as error:
                logger.warning("a replica did not answer (%d): %s", attempt, _first_line(error))
                if stream.begun:
                    await stream.end(EngineDeadError("the replica that generated has ended"))
                    return
            finally:
                response.cancel()
        message = f"{MAX_ATTEMPTS} replicas have failed to answer this call"
        await error_response(APIError(503, message))(scope, _nothing, send)

    async def _measure(self, request: Request) -> Response:
        """Answer with the metrics of all replicas."""
        found = await self._engines.broadcast("figures").results_async(timeout_s=10.0)
        return Response(_merged(found), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Stream:
    """What goes to the client, which must not be left without an end.

    Args:
        send: of the call.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_events = False
        self.begun = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._has_events = kind.startswith(b"text/event-stream")
        self.begun = True
        await self._send(message)

    async def end(self, error: Exception) -> None:
        """End an answer that has begun: events with an error, other bodies by breaking off."""
        if not self._has_events:
            raise error
        last = f"data: {json.dumps(as_api_error(error).body)}\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": last.encode(), "more_body": False})


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _first_line(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


class _Figures:
    """Metrics of several replicas, for `generate_latest`."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self._families


def _merged(replicas: Iterable[tuple[str, str]]) -> bytes:
    """Put the metrics of replicas together, each sample with its replica's name."""
    families: dict[str, Metric] = {}
    for replica, text in replicas:
        for family in text_string_to_metric_families(text):
            known = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = sample.labels | {"replica": replica}
                known.samples.append(sample._replace(labels=labels))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(families.values()))  # pyright: ignore
    return generate_latest(registry)
