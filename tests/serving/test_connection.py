"""Clients that do not take their answers: they keep no places, and no memory."""

import json
import logging
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import LiveServer, serve

from arctic_jax.engine.core import EngineCore
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.limits import Limits

WRITE_TIMEOUT = 1.0
LARGE: dict[str, Any] = {"prompt": "ab", "max_tokens": 400, "n": 4, "logprobs": 20}
LARGE |= {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module", params=["http", "https"])
def impatient(
    request: pytest.FixtureRequest, tiny_core: EngineCore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with places for four answers, and sockets that hold little."""
    uvicorn_options = {}
    if request.param == "https":
        key, signed = (tmp_path_factory.mktemp("tls") / name for name in ("key.pem", "cert.pem"))
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        command += f" -days 2 -keyout {key} -out {signed} -subj /CN=localhost"
        subprocess.run(command.split(), check=True, capture_output=True)
        uvicorn_options = {"ssl_keyfile": str(key), "ssl_certfile": str(signed)}
    engine = AsyncEngine(engine=tiny_core)
    with serve(
        engine,
        limits=Limits(max_num_queued_reqs=0),
        write_timeout=WRITE_TIMEOUT,
        uvicorn_options=uvicorn_options,
    ) as server:
        (listener,) = server.server.servers[0].sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have it
        yield server
        server.wait_until_idle()
    engine.shutdown()


def ask(server: LiveServer, *, stream: bool) -> socket.socket:
    """Send a call with a large answer, and read nothing."""
    scheme, host, port = server.url.replace("//", "").split(":")
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.settimeout(30)
    reader.connect((host, int(port)))
    if scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        reader = context.wrap_socket(reader)
    body = json.dumps(LARGE | {"stream": stream})
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    reader.sendall((head + body).encode())
    return reader


def wait_for(what: Any) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def timeouts(server: LiveServer) -> int:
    (line,) = [x for x in server.get("/metrics").text.splitlines() if "write_timeouts_total{" in x]
    return int(float(line.split()[-1]))


@pytest.mark.parametrize("stream", [True, False])
def test_who_reads_nothing_is_disconnected(
    impatient: LiveServer, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "arctic_jax.serving.connection")
    before, connections = timeouts(impatient), impatient.server.server_state.connections
    with ask(impatient, stream=stream) as reader:
        wait_for(lambda: any(c.transport.get_write_buffer_size() for c in list(connections)))
        if stream:  # it has all places, until it loses its connection
            assert impatient.complete(max_tokens=1).status_code == 503
        wait_for(lambda: timeouts(impatient) == before + 1)
        wait_for(lambda: not connections)
        impatient.wait_until_idle()
        assert impatient.complete(max_tokens=1).status_code == 200
        assert b"[DONE]" not in rest(reader)
    (record,) = caplog.records
    assert "took nothing of its answer for 1 s" in record.getMessage()


def rest(reader: socket.socket) -> bytes:
    said = b""
    try:
        while piece := reader.recv(1 << 16):
            said += piece
    except (ConnectionResetError, ssl.SSLError):
        pass
    return said


@pytest.mark.parametrize("impatient", ["http"], indirect=True)  # TLS hides pieces of 48 KiB
@pytest.mark.parametrize("stream", [True, False])
def test_who_reads_slowly_gets_everything(impatient: LiveServer, stream: bool) -> None:
    """For longer than the limit, never resting that long."""
    before, begun, said = timeouts(impatient), time.monotonic(), b""
    with ask(impatient, stream=stream) as reader:
        while time.monotonic() - begun < 2 * WRITE_TIMEOUT:
            said += reader.recv(2048)
            time.sleep(WRITE_TIMEOUT / 50)
        said += rest(reader)
    assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") or not stream
    assert len(said) > 400_000
    assert timeouts(impatient) == before
