"""Thousands of calls of which many misbehave; afterwards nothing is left, and the figures agree.

The soak is slow: `scripts/test serving/test_server_storm.py -m slow`.
"""

import asyncio
import gc
import json
import os
import random
import socket
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live_server import CLIENT, LiveServer

CALLS = 2000
SOAK_ROUNDS = 24
SOAK_CALLS = 1000
KINDS = {
    "whole": 4,
    "stream": 4,
    "embed": 2,
    "wrong": 2,
    "malformed": 2,
    "leave": 3,
    "timeout": 2,
    "cancel": 2,
    "hang up": 2,
    "slow": 1,
}


class Storm:
    """Calls of all kinds, drawn from a seed, and what became of them."""

    def __init__(self, live: LiveServer, encoder: LiveServer) -> None:
        self.live = live
        self.encoder = encoder
        self.kinds: Counter[str] = Counter()
        self.num_embedded = self.num_answers = self.num_tokens = 0

    async def run(self, calls: range) -> None:
        """Make these calls; 48 of them at once."""
        options: dict[str, Any] = {"base_url": self.live.url, "timeout": 120.0, **CLIENT}
        at_once = asyncio.Semaphore(48)
        async with httpx2.AsyncClient(**options) as client:

            async def one(seed: int) -> None:
                async with at_once:
                    draw = random.Random(seed)
                    (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
                    await self._call(client, draw, kind)
                    self.kinds[kind] += 1

            async with asyncio.TaskGroup() as group:
                for seed in calls:
                    group.create_task(one(seed))

    async def _call(self, client: httpx2.AsyncClient, draw: random.Random, kind: str) -> None:
        path, body, num_answers = self._generation(draw)
        if kind == "embed":
            await self._embed(client, draw)
        elif kind == "whole":
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            self._completed(answer.json()["usage"], body, num_answers)
        elif kind == "wrong":
            wrong = draw.choice([{"temperature": -1}, {"n": 0}, {"max_tokens": "x"}, {"stop": {}}])
            answer = await client.post(path, json=body | wrong)
            assert answer.status_code == 400, answer.text
        elif kind == "malformed":
            text = draw.choice(['{"prompt', "[" * 5000, "\0", '{"prompt": "\\ud800"}', "[]", ""])
            head = {"content-type": "application/json"}
            answer = await client.post(path, content=text, headers=head)
            assert answer.status_code == 400, answer.text
        elif kind == "timeout":
            try:
                await client.post(path, json=body, timeout=draw.uniform(0.001, 0.1))
            except httpx2.TimeoutException:
                return
        elif kind == "cancel":
            task = asyncio.create_task(client.post(path, json=body))
            await asyncio.sleep(draw.uniform(0, 0.1))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif kind == "hang up":
            await self._hang_up(draw)
        else:
            await self._stream(client, draw, kind, path, body, num_answers)

    def _generation(self, draw: random.Random) -> tuple[str, dict[str, Any], int]:
        """Return a path, a body that is right, and how many answers it asks for."""
        n, text = draw.choice([1, 1, 1, 2]), "".join(draw.choices("abcd ", k=draw.randrange(1, 40)))
        body = {"max_tokens": draw.randrange(1, 16), "n": n, "ignore_eos": True}
        body |= draw.choice([{}, {"temperature": 0.5}, {"seed": 5}, {"priority": 1}])
        if draw.random() < 0.3:
            body["messages"] = [{"role": "user", "content": text}]
            body |= draw.choice([{}, {"logprobs": True, "top_logprobs": 3}])
            return "/v1/chat/completions", body, n
        ids = [draw.randrange(250) for _ in range(draw.randrange(1, 60))]
        body["prompt"] = draw.choice([text, ids, [text, "ab"], [ids, ids, [5]]])
        body |= draw.choice([{}, {"logprobs": 2}, {"echo": True, "logprobs": 0}])
        many = len(body["prompt"]) if isinstance(body["prompt"][0], list) else 1
        return "/v1/completions", body, n * (2 if body["prompt"] == [text, "ab"] else many)

    async def _embed(self, client: httpx2.AsyncClient, draw: random.Random) -> None:
        texts = ["word " * draw.randrange(1, 9) for _ in range(draw.randrange(1, 5))]
        body = {"input": draw.choice([texts, texts[0], [[5, 6], [7]], 5, []])}
        answer = await client.post(f"{self.encoder.url}/v1/embeddings", json=body)
        if body["input"] in (5, []):
            assert answer.status_code == 400, answer.text
            return
        assert answer.status_code == 200, answer.text
        count = 1 if isinstance(body["input"], str) else len(body["input"])
        assert len(answer.json()["data"]) == count
        self.num_embedded += 1

    async def _stream(
        self,
        client: httpx2.AsyncClient,
        draw: random.Random,
        kind: str,
        path: str,
        body: dict[str, Any],
        num_answers: int,
    ) -> None:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        lines: list[str] = []
        async with client.stream("POST", path, json=body) as stream:
            assert stream.status_code == 200, await stream.aread()
            async for line in stream.aiter_lines():
                if line:
                    lines.append(line)
                if kind == "leave" and draw.random() < 0.2:
                    return
                if kind == "slow":
                    await asyncio.sleep(draw.random() / 50)
        assert lines[-1] == "data: [DONE]"
        usage = httpx2.Response(200, content=lines[-2].removeprefix("data: ")).json()["usage"]
        self._completed(usage, body, num_answers)

    async def _hang_up(self, draw: random.Random) -> None:
        """Send a part of a call and close the connection, in order or not."""
        host, port = self.live.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body = b'{"prompt": "hello", "max_tokens": 12, "ignore_eos": true, "stream": true}'
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        call = head.encode() + b"content-type: application/json\r\n\r\n" + body
        writer.write(call[: draw.choice([0, 20, len(call) - 5, len(call)])])
        await writer.drain()
        if draw.random() < 0.5:
            await asyncio.sleep(draw.uniform(0, 0.05))
        if draw.random() < 0.5:
            writer.transport.abort()
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    def _completed(self, usage: dict[str, Any], body: dict[str, Any], num_answers: int) -> None:
        expected = body["max_tokens"] * num_answers
        assert usage["completion_tokens"] == expected
        self.num_answers += num_answers
        self.num_tokens += expected


def figures(server: LiveServer) -> Counter[str]:
    """Read the metrics, without labels that are always the same."""
    found: Counter[str] = Counter()
    for line in server.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.replace('engine="0",', "").replace('model_name="tiny"', "")
            found[name.removeprefix("arctic_jax:").replace(",}", "}")] += float(value)  # pyright: ignore
    return found


def test_a_storm_leaves_nothing(
    live: LiveServer, encoder: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, accepted = live.engine.engine, []
    add = core.add_request

    def noted(request_id: str, ids: Any, params: Any, *more: Any) -> None:
        add(request_id, ids, params, *more)
        accepted.append(params.n)

    monkeypatch.setattr(core, "add_request", noted)
    before, embedded = figures(live), figures(encoder)
    storm = Storm(live, encoder)
    asyncio.run(storm.run(range(CALLS)))
    assert storm.kinds.total() == CALLS
    assert min(storm.kinds[kind] for kind in KINDS) > CALLS / 50
    live.wait_until_idle()

    after = figures(live)
    new = {name: value - before[name] for name, value in after.items()}
    ends = {
        reason: new[f'request_success_total{{finished_reason="{reason}"}}']
        for reason in ("length", "stop", "abort", "error")
    }
    assert sum(ends.values()) == sum(accepted)
    assert ends["stop"] == ends["error"] == new["corrupted_requests_total{}"] == 0
    assert storm.num_answers <= ends["length"] < sum(accepted)
    assert storm.num_tokens <= new["generation_tokens_total{}"]
    # All that was told to somebody in full, streams among it, was seen in full.
    assert new["request_generation_tokens_sum{}"] >= storm.num_tokens
    assert new["request_generation_tokens_sum{}"] <= new["generation_tokens_total{}"]
    assert after["num_requests_waiting{}"] == after["num_requests_running{}"] == 0
    assert after["kv_cache_usage_perc{}"] == 0
    assert new["compilations_after_ready_total{}"] == 0  # nor for embeddings: they are counted, too
    vectors = figures(encoder)['request_success_total{finished_reason="stop"}']
    assert vectors - embedded['request_success_total{finished_reason="stop"}'] == storm.num_embedded

    # With good calls only, every token is accounted for.
    before = figures(live)
    answers = [live.complete("abcd", seed=3, max_tokens=9, n=2).json() for _ in range(2)]
    live.wait_until_idle()
    new = {name: value - before[name] for name, value in figures(live).items()}
    assert answers[0]["choices"] == answers[1]["choices"]
    for kind, name in (("completion", "generation"), ("prompt", "prompt")):
        told = sum(answer["usage"][f"{kind}_tokens"] for answer in answers)
        assert new[f"{name}_tokens_total{{}}"] == told
    assert live.get("/health").status_code == encoder.get("/health").status_code == 200


def test_a_reader_that_does_not_read(live: LiveServer) -> None:
    """Nobody waits for it, what waits for it is bounded, and it misses nothing in the end."""
    host, port = live.url.removeprefix("http://").split(":")
    (listener,) = live.server.servers[0].sockets
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have it, too
    fields = {"max_tokens": 400, "n": 4, "logprobs": 20, "ignore_eos": True, "stream": True}
    body = json.dumps({"prompt": "x", "return_token_ids": True} | fields)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(30)
        reader.connect((host, int(port)))
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        reader.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        end, most = time.monotonic() + 30, 0
        while live.engine.engine.has_requests or not most:
            assert time.monotonic() < end, "the engine waits for the reader"
            assert live.complete("ab", max_tokens=2).status_code == 200
            most = max(most, *map(waiting_bytes, list(live.server.server_state.connections)))
        assert live.model.admission.num_calls == 1  # it has long been computed
        said = b""
        while b"[DONE]" not in said:
            said += reader.recv(1 << 16)
    assert most < 100_000 < len(said) / 4
    events = [line[6:] for line in said.decode().splitlines() if line.startswith("data: {")]
    choices = [json.loads(event)["choices"][0] for event in events]
    assert Counter(c["index"] for c in choices for _ in c["token_ids"]) == dict.fromkeys(
        range(4), 400
    )
    assert len(events) < 800  # what waited was put together
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    live.wait_until_idle()


def waiting_bytes(connection: Any) -> int:
    return connection.transport.get_write_buffer_size()


@pytest.mark.slow
def test_a_soak_does_not_grow(live: LiveServer, encoder: LiveServer) -> None:
    """Round after round the process stays as large as it was, within what rounds differ anyway.

    Half a MiB in a thousand calls is the tokenizer's: threads keep tokens of words (`bound_cache`).
    """
    pages = Path("/proc/self/statm")
    sizes, objects = [], []
    storm = Storm(live, encoder)
    for i in range(SOAK_ROUNDS):
        asyncio.run(storm.run(range(i * SOAK_CALLS, (i + 1) * SOAK_CALLS)))
        live.wait_until_idle()
        gc.collect()
        sizes.append(int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        objects.append(len(gc.get_objects()))
        print(f"round {i}: {sizes[-1]:.1f} MiB, {objects[-1]} objects", flush=True)
    third = SOAK_ROUNDS // 3
    middle, last = sizes[third:-third], sizes[-third:]
    noise = max(middle) - min(middle)
    assert statistics.median(last) - statistics.median(middle) <= max(noise, 4)
    # Less than an object for every tenth call, however large the process is.
    kept = statistics.median(objects[-third:]) - statistics.median(objects[:third])
    assert kept < third * SOAK_CALLS / 5
