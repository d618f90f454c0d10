"""A server's life: its socket, its signals, the watch over its engine, its end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import math
import os
import socket
import stat
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from arctic_jax.config import EngineConfig
from arctic_jax.embedding.embedder import Embedder
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.replicas import make_engine
from arctic_jax.errors import EngineDeadError
from arctic_jax.loading.model_files import open_model
from arctic_jax.models.registry import is_encoder
from arctic_jax.progress import bars
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.connection import Connection
from arctic_jax.serving.embedding_engine import EmbeddingEngine
from arctic_jax.serving.metrics import Metrics
from arctic_jax.serving.served_model import ServedModel

logger = logging.getLogger(__name__)

_LAST_WORDS = 5.0  # seconds for error events to be read, after which connections are cut


class Server(uvicorn.Server):
    """Serves an app, and ends in good order.

    The first SIGTERM or SIGINT: no new connections and calls; those that run may finish. After
    `shutdown_timeout` seconds they end with an error. A second signal ends the process at once.

    Args:
        config: of uvicorn.
        model: whose engine is watched.
        shutdown_timeout: see above.
        step_timeout: seconds after which an engine that has requests and does not begin a step is
            given up; 0 for never.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        model: ServedModel,
        shutdown_timeout: float,
        step_timeout: float,
    ) -> None:
        super().__init__(config)
        config.timeout_graceful_shutdown = int(shutdown_timeout + _LAST_WORDS)
        self._model = model
        self._shutdown_timeout = shutdown_timeout
        self._step_timeout = step_timeout
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and watch the engine."""
        await super().startup(sockets)
        if self._model.generates:
            self._watch = asyncio.create_task(watch(self._model.engine, self._step_timeout))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what runs, but not for ever."""
        self._model.draining = True
        loop = asyncio.get_running_loop()
        end = loop.call_later(self._shutdown_timeout, self._model.fail, "the server shuts down")
        hanging_up = asyncio.create_task(self._hang_up())
        await super().shutdown(sockets)
        end.cancel()
        for task in (hanging_up, self._watch):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _hang_up(self) -> None:
        """Cut connections on which everything is said: an idle client with TLS says no goodbye."""
        while connections := list(self.server_state.connections):
            await asyncio.sleep(0.1)
            for connection in connections if not self.server_state.tasks else ():
                transport: Any = connection.transport
                if not transport.get_write_buffer_size():
                    transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end; a second time, end."""
        if self.should_exit:
            os._exit(128 + sig)
        self._model.draining = self.should_exit = True


async def watch(engine: AsyncEngine, timeout: float) -> None:
    """Give an engine up when it cannot go on, or has not begun a step for too long.

    Args:
        engine: idle, it has all the time.
        timeout: seconds of a step; 0 for no limit.
    """
    timeout = timeout or math.inf
    cores = engine.engine.cores
    seen = {core: (core.num_steps, time.monotonic()) for core in cores}
    while not engine.dead:
        await asyncio.sleep(min(timeout / 4, 1.0))
        now = time.monotonic()
        for core in cores:
            if core.failure is not None:
                engine.fail(EngineDeadError(core.failure))
                return
            if not core.has_requests or core.num_steps != seen[core][0]:
                seen[core] = core.num_steps, now
            elif now - seen[core][1] > timeout:
                engine.fail(EngineDeadError(f"a step has taken more than {timeout:g} s"))
                return


def bind(host: str, port: int, uds: str | None) -> socket.socket:
    """Take the address, before the model is loaded: it would be a pity to find it in use then.

    Raises:
        OSError: the address is in use, or is none of this machine's.
    """
    if uds is not None:
        path = Path(uds)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):  # left behind by an earlier server
                path.unlink()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(uds)
        return listener
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    return listener


def is_local(host: str, uds: str | None) -> bool:
    """Whether only this machine can reach an address."""
    if uds is not None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(options: dict[str, Any]) -> AsyncEngine | EmbeddingEngine:
    """Load a model, `options` as for `LLM`, and make the engine for its kind."""
    config = EngineConfig.from_keywords(**options)
    with bars() as report:
        files = open_model(config.load, report)
        if is_encoder(files.config, files.directory):
            return EmbeddingEngine(embedder=Embedder(config, report, files))
        return AsyncEngine(engine=make_engine(config, report, files))


def follow(options: dict[str, Any]) -> None:
    """Be a node without requests of an engine, `options` as for `LLM`, until node 0 ends.

    Does not return: the process ends without JAX's good-bye, which needs a node 0 that lives.
    """
    config = EngineConfig.from_keywords(**options)
    with bars() as report:
        files = open_model(config.load, report)
        if is_encoder(files.config, files.directory):
            raise ValueError("nnodes: models that embed run on one machine")
        core = EngineCore(config, report, files)
    try:
        core.runner.follow()
    except Exception as error:
        logger.error("node %d ends: %s", config.parallel.node_rank, error)
        os._exit(1)
    os._exit(0)


def measure(model: ServedModel, prefix: str) -> Metrics:
    """Begin to count what a model does, under names with that prefix."""
    metrics = Metrics(model.name, prefix)
    if model.generates:
        metrics.watch(model.engine.engine.cores, model.admission)
    return metrics


def configure(app: Any, metrics: Metrics, write_timeout: float, **options: Any) -> uvicorn.Config:
    """Make uvicorn's configuration, `options` on top of what is always so."""
    connection: Any = functools.partial(
        Connection, write_timeout=write_timeout, on_write_timeout=metrics.write_timed_out
    )
    return uvicorn.Config(
        app, http=connection, ws="none", lifespan="off", server_header=False, **options
    )


def run(
    app: Any,
    listener: socket.socket,
    model: ServedModel,
    engine: AsyncEngine | EmbeddingEngine,
    metrics: Metrics,
    *,
    shutdown_timeout: float,
    step_timeout: float,
    write_timeout: float,
    **options: Any,
) -> None:
    """Serve until told to stop; `options` are `uvicorn.Config`'s."""
    config = configure(app, metrics, write_timeout, **options)
    server = Server(config, model, shutdown_timeout, step_timeout)
    server.run([listener])
    if not stop(engine):
        os._exit(1)  # its thread is stuck in a step, and Python would wait for it


def stop(engine: AsyncEngine | EmbeddingEngine) -> bool:
    """End an engine; return whether its thread has ended, and is not stuck in a step."""
    if isinstance(engine, EmbeddingEngine):
        engine.shutdown()
        return True
    return engine.shutdown(timeout=_LAST_WORDS)
