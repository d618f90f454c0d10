"""A server on a free port of this machine, in a thread of its own."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2

from arctic_jax.serving import lifecycle
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.embedding_engine import EmbeddingEngine
from arctic_jax.serving.limits import Limits
from arctic_jax.serving.metrics import Metrics
from arctic_jax.serving.served_model import ServedModel, ServedOptions
from arctic_jax.serving.server import HttpOptions, build_app

TIMEOUT = 120.0
CLIENT: dict[str, Any] = {"trust_env": False, "verify": False}  # reading certificates takes long


@dataclass
class LiveServer:
    """What a test may ask of it, and look at."""

    url: str
    engine: Any
    model: ServedModel
    metrics: Metrics
    server: lifecycle.Server
    thread: threading.Thread

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=TIMEOUT, **CLIENT, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        with self.client() as client:
            return client.get(path, **options)

    def complete(self, prompt: Any = "ab", **fields: Any) -> httpx2.Response:
        return self.post("/v1/completions", {"prompt": prompt} | fields)

    def chat(self, text: str = "hello", **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": text}]} | fields
        return self.post("/v1/chat/completions", body)

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Wait until the engine has nothing to do, and check that nothing is left."""
        core, end = self.engine.engine, time.monotonic() + seconds
        while core.has_requests or self.model.admission.num_calls:
            assert time.monotonic() < end, "requests are stuck"
            time.sleep(0.01)
        core.check()
        for one in core.cores:
            assert one.scheduler.pool.num_free == one.scheduler.pool.num_blocks
            assert not one._groups
        admission = self.model.admission
        assert (admission.num_answers, admission.num_waiting_tokens) == (0, 0)
        assert not self.engine._mailboxes


@contextlib.contextmanager
def serve(
    engine: AsyncEngine | EmbeddingEngine,
    *,
    http: HttpOptions | None = None,
    limits: Limits | None = None,
    shutdown_timeout: float = 5.0,
    step_timeout: float = 0.0,
    write_timeout: float = 60.0,
    uvicorn_options: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[LiveServer]:
    """Serve until the test is over."""
    options = {"names": ("tiny", "alias"), "limits": limits or Limits()} | options
    model = ServedModel(engine, ServedOptions(**options))
    metrics = Metrics(model.name)
    if model.generates:
        metrics.watch(model.engine.engine.cores, model.admission)
    listener = lifecycle.bind("127.0.0.1", 0, None)
    port = listener.getsockname()[1]
    config = lifecycle.configure(
        build_app(model, metrics, http),
        metrics,
        write_timeout,
        log_level="critical",
        **(uvicorn_options or {}),
    )
    server = lifecycle.Server(config, model, shutdown_timeout, step_timeout)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        end = time.monotonic() + TIMEOUT
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)
        scheme = "https" if config.is_ssl else "http"
        yield LiveServer(f"{scheme}://127.0.0.1:{port}", engine, model, metrics, server, thread)
    finally:
        server.should_exit = True
        thread.join(TIMEOUT)
        if model.generates:
            metrics.close()
        assert not thread.is_alive()
