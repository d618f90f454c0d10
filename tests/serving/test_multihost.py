"""One engine over two processes of two CPU devices each, as over two machines."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import numpy as np
import pytest
from live_server import CLIENT
from tiny_engine import run

from arctic_jax.config import ParallelConfig
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.multihost import Followers, Launch, Leader, Nodes
from arctic_jax.errors import EngineDeadError
from arctic_jax.llm import LLM
from arctic_jax.request import SamplingParams

SMALL = ["--max-num-seqs", "1", "--max-num-batched-tokens", "8", "--num-blocks", "32"]
SHARED = ["--tensor-parallel-size", "2", "--ulysses-sequence-parallel-size", "2"]
LAYOUTS = ["--shift-parallel-threshold", "4"]
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("ab" * 20, {"temperature": 0}),
    ("cde", {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {"120": 3.0}}),
    ("xyz", {"temperature": 0.8, "seed": 3}),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def two_nodes(model: Path, folder: Path) -> Iterator[tuple[httpx2.Client, list[Any]]]:
    """A server and its follower, ready; and whatever they say, in files."""
    uds, master_port = str(folder / "socket"), free_port()
    line = [sys.executable, "-m", "arctic_jax.serving.cli", "serve", str(model), "--uds", uds]
    line += ["--nnodes", "2", "--master-port", str(master_port), *SMALL, *SHARED, *LAYOUTS]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    nodes = []
    with contextlib.ExitStack() as stack:
        for rank, more in enumerate(([], ["--headless"])):
            log = stack.enter_context((folder / f"node{rank}.log").open("w"))
            process = subprocess.Popen(
                [*line, "--node-rank", str(rank), *more], stderr=log, stdout=log, env=environment
            )
            nodes.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        end = time.monotonic() + 240
        while not is_open(uds):
            for rank, process in enumerate(nodes):
                assert process.poll() is None, said(folder, rank)
            assert time.monotonic() < end, said(folder, 0)
            time.sleep(0.1)
        client = httpx2.Client(
            base_url="http://node", transport=httpx2.HTTPTransport(uds=uds), timeout=60.0, **CLIENT
        )
        yield stack.enter_context(client), nodes


def is_open(uds: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(uds)
        return True
    return False


def said(folder: Path, rank: int) -> str:
    return (folder / f"node{rank}.log").read_text()


def test_two_nodes_answer_as_one(tiny_model: Path, tiny_core: EngineCore, tmp_path: Path) -> None:
    length = {"max_tokens": 30, "ignore_eos": True}
    for i, (prompt, fields) in enumerate(PROMPTS):
        ids = tiny_core.tokenizer.encode(prompt)
        bias = {int(k): v for k, v in fields.get("logit_bias", {}).items()} or None
        params = SamplingParams(**(fields | length | {"logit_bias": bias}))
        tiny_core.add_request(str(i), ids, params)
    expected = run(tiny_core)
    with two_nodes(tiny_model, tmp_path) as (client, nodes):
        for i, (prompt, fields) in enumerate(PROMPTS):
            body = {"prompt": prompt, "return_token_ids": True} | fields | length
            answer = client.post("/v1/completions", json=body).json()["choices"][0]
            assert answer["token_ids"] == list(expected[str(i)].outputs[0].token_ids)

        body = {"prompt": "ab", "max_tokens": 490, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
            next(lines)
            nodes[1].kill()
            *_, last, done = lines
        assert done == "[DONE]"
        assert "node 1 is lost" in json.loads(last)["error"]["message"]
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "ab"}).status_code == 500
        nodes[0].send_signal(signal.SIGTERM)
        nodes[0].wait(30)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_the_follower_ends_with_the_leader(
    tiny_model: Path, tmp_path: Path, sig: signal.Signals
) -> None:
    with two_nodes(tiny_model, tmp_path) as (_, nodes):
        nodes[0].send_signal(sig)
        killed = sig == signal.SIGKILL
        assert (nodes[1].wait(30) != 0) == killed
        assert ("node 0 is lost" in said(tmp_path, 1)) == killed
        nodes[0].wait(30)


class OneSays(Nodes):
    """Nodes of one process: what node 0 says is left for the others."""

    said = ""

    def everyones(self, value: str) -> list[str]:
        if self.rank == 0:
            OneSays.said = value
        return [OneSays.said]


def test_strangers_are_turned_away() -> None:
    """Launches arrive as they were, and only at those who know the key."""
    found: list[Any] = []
    parallel = ParallelConfig(nnodes=2)
    starting = Thread(target=lambda: found.append(Followers(OneSays(parallel), "127.0.0.1")))
    starting.start()
    while not OneSays.said:
        time.sleep(0.01)
    port, _ = OneSays.said.split()
    with socket.create_connection(("127.0.0.1", int(port)), 10) as stranger:
        stranger.recv(32)
        stranger.sendall(bytes([1, *[0] * 39]))
        assert stranger.recv(1) == b""
    leader = Leader(OneSays(ParallelConfig(nnodes=2, node_rank=1)), "127.0.0.1")
    starting.join(10)
    (followers,) = found
    rng = np.random.default_rng(0)
    bias = np.where(rng.random(50) < 0.5, -np.inf, rng.normal(size=50)).astype(np.float32)
    rows = [(slot, rng.integers(0, 9, 50, np.int32), bias) for slot in (3, 0)]
    masks = [(16, rng.integers(-9, 9, (16, 2), np.int32), rng.integers(0, 4, 16, np.int32))]
    packed = rng.integers(-5, 5, 20, np.int32)
    moves = rng.integers(0, 99, (3, 2), np.int32)
    for sent in (Launch(7, rows, masks, packed, moves), Launch(0, [], masks, packed, moves[:0])):
        followers.send(sent)
        np.testing.assert_equal(vars(leader.receive()), vars(sent))
    followers.close()
    assert leader.receive() is None
    leader.close()
    assert followers.failed(10) == "node 1 is lost"
    with pytest.raises(EngineDeadError, match="node 1 is lost"):
        followers.send(sent)
    followers.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nnodes": 2, "node_rank": 2}, "node_rank must be 0 to 1 with nnodes=2, got 2"),
        ({"nnodes": 2, "data_parallel_size": 2}, "data_parallel_size=2 does not go with nnodes=2"),
        ({"nnodes": 2, "node_rank": 1}, "node_rank=1 only follows node 0"),
        ({"nnodes": 0}, "nnodes must be at least 1, got 0"),
    ],
)
def test_wrong_options(tiny_model: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(tiny_model), progress=False, **options)
