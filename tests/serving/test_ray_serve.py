"""The server under Ray Serve: two replicas on this machine, one of which is killed under load."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from live_server import CLIENT

from arctic_jax.errors import EngineDeadError
from arctic_jax.serving.serve import settings_of

pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

SMALL = {"max-num-seqs": 4, "max-num-batched-tokens": 64, "block-size": 16, "num-blocks": 96}
CALL: dict[str, Any] = {"prompt": "ab", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
MARK = "ARCTIC_JAX_TEST"


def processes(mark: str, title: str = "") -> list[int]:
    """Processes that were started by a command with this mark in its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes():
                continue
            if title.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(config: dict[str, Any]) -> Iterator[tuple[httpx2.Client, str]]:
    """`serve run`, until the application answers; a client of it, and the mark of its processes."""
    mark, port = uuid.uuid4().hex, free_port()
    config |= {"http_options": {"host": "127.0.0.1", "port": port}}
    # Short, as sockets lie in it.
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        file, log = Path(folder, "application.yaml"), Path(folder, "log")
        file.write_text(yaml.safe_dump(config))
        environment = os.environ | {
            MARK: mark,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_TOKEN": mark,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        line = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
        with log.open("w") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output, env=environment)
        try:
            with httpx2.Client(
                base_url=f"http://127.0.0.1:{port}", timeout=60.0, **CLIENT
            ) as client:
                assert wait_for(lambda: answers(client, process, log)), log.read_text()
                yield client, mark
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            process.kill()
            process.wait()
            all_ended = wait_for(lambda: not processes(mark), seconds=15)
            for pid in processes(mark):
                os.kill(pid, signal.SIGKILL)
        assert all_ended, "processes are left behind"


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> bool:
    """Wait, not for ever; whether it has come true."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return met


def answers(client: httpx2.Client, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with contextlib.suppress(httpx2.TransportError):
        return client.get("/health").status_code == 200
    return False


def replicas(client: httpx2.Client) -> set[str]:
    lines = client.get("/metrics").text.splitlines()
    running = [line for line in lines if line.startswith("arctic_jax:num_requests_running{")]
    return {line.partition('replica="')[2].partition('"')[0] for line in running}


def total(client: httpx2.Client, *parts: str) -> float:
    """The sum of all metrics whose lines have these parts."""
    lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if all(part in line for part in parts)]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def ends_of_streams(
    client: httpx2.Client, begun: threading.Event, killed: threading.Event
) -> list[dict[str, Any]]:
    """The last event of one stream after the other, until a replica was killed meanwhile."""
    ends, body = [], CALL | {"max_tokens": 490, "stream": True}
    while not killed.is_set():
        with client.stream("POST", "/v1/completions", json=body) as response:
            events = []
            for line in response.iter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
                    begun.set()
        assert events.pop() == "[DONE]"
        ends.append(json.loads(events[-1]))
    return ends


@pytest.mark.slow
def test_a_replica_that_is_killed_takes_no_call_with_it(tiny_model: Path) -> None:
    application = {
        "name": "default",
        "import_path": "arctic_jax.serving.ray_serve:build_app",
        "args": SMALL
        | {"model": str(tiny_model), "served_model_name": "tiny"}
        | {"num_replicas": 2, "num_gpus": 0, "health_check_period_s": 1}
        | {"ray_actor_options": {"num_cpus": 0.1}},
    }
    with running({"applications": [application]}) as (client, mark), ThreadPoolExecutor(14) as pool:
        assert wait_for(lambda: len(replicas(client)) == 2)  # the first one answers alone
        before = replicas(client)
        expected = client.post("/v1/completions", json=CALL).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions", json=CALL | {"stream": True}) as left_early:
            next(left_early.iter_lines())
        assert wait_for(
            lambda: total(client, "request_success_total{", 'finished_reason="abort"') == 1
        )

        begun, killed = [threading.Event() for _ in range(6)], threading.Event()
        streams = []
        for event in begun:  # one after the other, so that each replica has some
            streams.append(pool.submit(ends_of_streams, client, event, killed))
            assert event.wait(30)
        calls: list[Future[httpx2.Response]] = [
            pool.submit(client.post, "/v1/completions", json=CALL) for _ in range(40)
        ]
        wait(calls, return_when=FIRST_COMPLETED)
        victim, _ = processes(mark, "ServeReplica:default:Engine")
        os.kill(victim, signal.SIGKILL)
        killed.set()
        for call in calls:
            answer = call.result()
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == expected
        ends = [end for future in streams for end in future.result()]
        broken = [end["error"]["message"] for end in ends if "error" in end]
        assert broken
        assert "the replica that generated has ended" in broken[0]
        whole = [end["choices"][0]["finish_reason"] for end in ends if "error" not in end]
        assert set(whole) == {"length"}

        assert wait_for(lambda: len(replicas(client)) == 2)
        assert replicas(client) != before


def options_of(**options: Any) -> dict[str, Any]:
    from arctic_jax.serving.ray_serve import build_app

    engines = build_app(options)._bound_deployment.init_args[-1]._bound_deployment  # as Ray sees it
    config = engines._deployment_config
    return config.model_dump() | {"actor": engines.ray_actor_options}


def test_options_of_the_deployment() -> None:
    plain = options_of(model="m", max_num_seqs="8", tensor_parallel_size="2")
    assert (plain["max_ongoing_requests"], plain["actor"]["num_gpus"]) == (16, 2)
    assert (plain["graceful_shutdown_timeout_s"], plain["num_replicas"]) == (35.0, 1)
    scaled = options_of(
        **{"model": "m", "num-replicas": "auto", "num_gpus": 0, "shutdown-timeout": 5},
        autoscaling_config="{max_replicas: 7}",
        ray_actor_options={"num_cpus": 3},
    )
    automatic = scaled["autoscaling_config"]
    assert (automatic["target_ongoing_requests"], automatic["max_replicas"]) == (16, 7)
    assert scaled["actor"] == {"num_cpus": 3, "num_gpus": 0}
    assert scaled["graceful_shutdown_timeout_s"] == 10.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modle": "m"}, "there is no option --modle"),
        ({"port": 1}, "port: Ray Serve's proxy listens"),
        ({"ssl-keyfile": "k"}, "ssl_keyfile: Ray Serve's proxy listens"),
        ({"max-num-seqs": "many"}, "max-num-seqs"),
        ({"max-num-seqs": 0}, "max_num_seqs must be at least 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    from arctic_jax.serving.ray_serve import build_app

    with pytest.raises(ValueError, match=message):
        build_app(options)


def test_a_replica_whose_engine_dies(tiny_model: Path) -> None:
    """It is unhealthy, and what it has not begun to answer is another replica's."""
    from arctic_jax.serving.ray_serve import Engine

    async def live() -> None:
        replica: Any = Engine.__new__(Engine)
        await replica.__init__(settings_of({"model": str(tiny_model)} | SMALL))
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
        scope |= {"query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http"}
        start, body, *_ = [message async for message in replica.answer(scope, b"")]
        assert (start["status"], b"tiny" in body["body"]) == (200, True)
        await replica.check_health()
        replica._model.fail("a step has taken too long")
        with pytest.raises(EngineDeadError):
            await replica.check_health()
        call = scope | {"method": "POST", "path": "/v1/completions"}
        call["headers"] = [(b"content-type", b"application/json")]
        with pytest.raises(EngineDeadError):
            _ = [m async for m in replica.answer(call, json.dumps(CALL).encode())]

    asyncio.run(live())
