"""How a server ends: asked to, with its engine dead, with its engine stuck."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live_server import CLIENT, LiveServer, serve
from typer.testing import CliRunner

from arctic_jax.engine.core import EngineCore
from arctic_jax.request import RequestOutput
from arctic_jax.serving import cli, lifecycle
from arctic_jax.serving.async_engine import AsyncEngine

LONG: dict[str, Any] = {"prompt": "ab", "max_tokens": 490, "ignore_eos": True, "stream": True}


@contextlib.contextmanager
def streaming(server: LiveServer) -> Iterator[Iterator[str]]:
    """A long stream, of which the first event was read."""
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as stream:
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        next(lines)
        yield lines


def slowly(monkeypatch: pytest.MonkeyPatch, core: EngineCore, seconds: float) -> None:
    step = core.step

    def slow() -> list[RequestOutput]:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(core, "step", slow)


def abort_all(core: EngineCore) -> None:
    for request_id in list(core._groups):
        core.abort(request_id)
    core.check()


def test_what_runs_may_finish(tiny_core: EngineCore) -> None:
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, shutdown_timeout=20) as server, server.client() as kept:
        kept.get("/health")
        with streaming(server) as lines:
            server.server.handle_exit(signal.SIGTERM, None)
            assert not server.model.healthy
            *_, last, done = lines
            assert done == "[DONE]"
            assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        server.thread.join(5)
        assert not server.thread.is_alive()
        with pytest.raises(httpx2.ConnectError):
            server.get("/health")
    assert engine.shutdown(5)
    tiny_core.check()


def test_what_takes_too_long_ends_with_an_error(
    tiny_core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch, tiny_core, 0.05)
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, shutdown_timeout=0.5) as server:
        with streaming(server) as lines:
            server.server.handle_exit(signal.SIGTERM, None)
            started = time.monotonic()
            *_, last, done = lines
            assert done == "[DONE]"
            assert "the server shuts down" in json.loads(last)["error"]["message"]
            assert 0.3 < time.monotonic() - started < 2
        server.thread.join(2)
        assert not server.thread.is_alive()
    assert engine.shutdown(5)
    abort_all(tiny_core)


def test_calls_that_come_too_late_are_refused(tiny_core: EngineCore) -> None:
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine) as server:
        server.model.draining = True
        assert server.get("/health").status_code == 503
        response = server.complete("ab")
        assert response.status_code == 503
        assert "retry-after" in response.headers
        server.model.draining = False
        assert server.get("/health").status_code == 200
    engine.shutdown()


def test_a_dead_engine_is_said_to_be_dead(
    tiny_core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failing = tiny_core.step, threading.Event()

    def fail() -> list[RequestOutput]:
        time.sleep(0.01)
        if failing.is_set():
            raise MemoryError("out of memory at /usr/lib/secret/place")
        return step()

    monkeypatch.setattr(tiny_core, "step", fail)
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine) as server:
        with streaming(server) as lines:
            failing.set()
            *_, last, done = lines
            assert done == "[DONE]"
            error = json.loads(last)["error"]
            assert (error["code"], error["type"]) == (500, "InternalServerError")
            assert "out of memory at …" in error["message"]
        assert server.get("/health").status_code == 503
        for stream in (True, False):
            assert server.complete("ab", stream=stream).status_code == 500
        assert server.get("/metrics").status_code == 200
    engine.shutdown()
    abort_all(tiny_core)


def test_a_stuck_engine_is_given_up(tiny_core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    step, stuck, goes_on = tiny_core.step, threading.Event(), threading.Event()

    def stick() -> list[RequestOutput]:
        time.sleep(0.01)
        if stuck.is_set():
            assert goes_on.wait(20)
        return step()

    monkeypatch.setattr(tiny_core, "step", stick)
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, step_timeout=1.0) as server:
        with streaming(server) as lines:
            time.sleep(1.3)  # long calls alone are no reason
            assert server.get("/health").status_code == 200
            stuck.set()
            started = time.monotonic()
            *_, last, done = lines
            assert done == "[DONE]"
            assert "a step has taken more than 1 s" in json.loads(last)["error"]["message"]
            assert time.monotonic() - started < 3
        assert server.get("/health").status_code == 503
        started = time.monotonic()
        assert server.complete("ab").status_code == 500
        assert time.monotonic() - started < 1
        assert not engine.shutdown(0.1)
        goes_on.set()
        assert engine.shutdown(5)
    abort_all(tiny_core)


def test_idle_connections_are_closed(tiny_core: EngineCore) -> None:
    """Also those on which nothing was ever asked; and a thousand are no harm meanwhile."""
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, uvicorn_options={"timeout_keep_alive": 2}) as server:
        port = int(server.url.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            idle = []
            for i in range(1000):
                connection = socket.create_connection(("127.0.0.1", port), timeout=20)
                idle.append(stack.enter_context(connection))
                if i % 2:  # it has asked once, and keeps the connection for more
                    connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            for _ in range(3):
                assert server.complete("ab", max_tokens=2).status_code == 200
            assert server.get("/load").json() == {"server_load": 0}
            for i, connection in enumerate(idle):
                said = b"".join(iter(lambda c=connection: c.recv(4096), b""))
                assert said.startswith(b"HTTP/1.1 200 OK" if i % 2 else b"")
                assert bool(said) == bool(i % 2)
        end = time.monotonic() + 10
        while server.server.server_state.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert not server.server.server_state.connections
        assert server.complete("ab", max_tokens=2).status_code == 200
    engine.shutdown()


def test_addresses_that_others_reach() -> None:
    assert lifecycle.is_local("127.0.0.1", None)
    assert lifecycle.is_local("::1", None)
    assert lifecycle.is_local("localhost", None)
    assert lifecycle.is_local("0.0.0.0", "/run/a.sock")
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        assert not lifecycle.is_local(host, None)


def certificate(folder: Path) -> list[str]:
    """A key and a certificate that it has signed itself."""
    key, signed = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += f" -keyout {key} -out {signed} -subj /CN=localhost"
    subprocess.run(command.split(), check=True, capture_output=True)
    return ["--ssl-keyfile", str(key), "--ssl-certfile", str(signed)]


@contextlib.contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`arctic-jax serve` as a process."""
    line = [sys.executable, "-m", "arctic_jax.serving.cli", "serve", *arguments]
    options = ["--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--num-blocks", "32"]
    environment = {name: v for name, v in os.environ.items() if "API_KEY" not in name}
    with subprocess.Popen(
        [*line, *options], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_ready(uds: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(uds)
            return
        time.sleep(0.1)
    raise AssertionError("not ready")


@pytest.mark.parametrize("twice", [False, True])
def test_the_command(tiny_model: Path, tmp_path: Path, twice: bool) -> None:
    """With TLS on a unix socket and its options in a file; ended once, or twice in a row."""
    settings = {"uds": str(tmp_path / "socket"), "served-model-name": ["mine"], "api_key": ["k"]}
    settings |= {"metrics-prefix": "vllm:", "speculative-config": {"method": "ngram"}}
    settings |= {"no-enable-prefix-caching": True, "shutdown_timeout": 20}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))  # which is YAML, too
    transport = httpx2.HTTPTransport(uds=settings["uds"], verify=False)
    client = httpx2.Client(
        base_url="https://localhost",
        transport=transport,
        timeout=30.0,
        headers={"authorization": "Bearer k"},
        **CLIENT,
    )
    arguments = [str(tiny_model), "--config", str(file), *certificate(tmp_path)]
    with command(*arguments) as process, client:
        wait_until_ready(settings["uds"], process)
        assert client.get("/health", headers={"authorization": ""}).status_code == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        body = {"prompt": "abab" * 10, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 40
        figures = client.get("/metrics").text
        assert "vllm:spec_decode_num_drafts_total" in figures
        assert 'enable_prefix_caching="False"' in figures
        with client.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGTERM)
            if twice:
                time.sleep(0.3)
                started = time.monotonic()
                process.send_signal(signal.SIGINT)
                assert process.wait(5) == 128 + signal.SIGINT
                assert time.monotonic() - started < 2
                return
            assert list(lines)[-1] == "data: [DONE]"
        assert process.wait(20) == 0


REFUSED = [
    (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others than this machine in"),
    (["--tool-call-parser", "x"], "--tool-call-parser must be one of hermes, llama3_json, qwen"),
    (["--enable-auto-tool-choice"], "--enable-auto-tool-choice needs --tool-call-parser"),
    (["--otlp-traces-endpoint", "x"], "--otlp-traces-endpoint must be an http or https URL"),
    (["--allowed-origins", "x"], "--allowed-origins is not JSON"),
    (["--speculative_config", "{"], "speculative_config is not JSON"),
]


def refusal(*arguments: str) -> str:
    """What the command says before it gives up, in this process."""
    result = CliRunner().invoke(cli.app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_served_is_refused_at_once(arguments: list[str], message: str) -> None:
    assert message in refusal(*arguments)


def test_a_file_of_unknown_options(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max-modle-len: 5")
    assert "there is no option --max-modle-len" in refusal("--config", str(file))


def test_an_address_in_use_is_found_out_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Address already in use" in refusal("--port", port, "--model", "/none")
