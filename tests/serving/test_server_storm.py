"""Hundreds of calls at once, of which many misbehave; afterwards nothing is left of them."""

import asyncio
import random
from collections import Counter

import httpx2
from live_server import CLIENT, LiveServer

CALLS = 300


async def call(client: httpx2.AsyncClient, draw: random.Random) -> str:
    """One client of some kind; what became of it."""
    kind = draw.choice(["plain", "stream", "leave", "timeout", "slow", "wrong", "cancel"])
    body = {
        "prompt": [[draw.randrange(250) for _ in range(draw.randrange(1, 60))]]
        * draw.choice([1, 1, 3]),
        "max_tokens": draw.randrange(1, 40),
        "n": draw.choice([1, 1, 2]),
        "ignore_eos": True,
    }
    if kind == "plain":
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        expected = body["max_tokens"] * body["n"] * len(body["prompt"])
        assert answer.json()["usage"]["completion_tokens"] == expected
    elif kind == "wrong":
        body["temperature"] = draw.choice([-1, "x", None, {}])
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code in (200, 400)
    elif kind == "timeout":
        try:
            await client.post("/v1/completions", json=body, timeout=draw.random() / 5)
        except httpx2.TimeoutException:
            return "timed out"
    elif kind == "cancel":
        task = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.sleep(draw.random() / 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    else:
        lines = []
        url = "/v1/completions"
        async with client.stream("POST", url, json=body | {"stream": True}) as stream:
            async for line in stream.aiter_lines():
                lines.append(line)
                if kind == "leave" and draw.random() < 0.2:
                    return kind
                if kind == "slow":
                    await asyncio.sleep(draw.random() / 50)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    return kind


async def storm(url: str) -> Counter[str]:
    options = {"base_url": url, "timeout": 60.0, **CLIENT}
    limits = httpx2.Limits(max_connections=64)
    draws = [random.Random(i) for i in range(CALLS)]
    async with httpx2.AsyncClient(**options, limits=limits) as client:  # pyright: ignore
        return Counter(await asyncio.gather(*(call(client, draw) for draw in draws)))


def test_a_storm_leaves_nothing(live: LiveServer) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert live.post(path, {}).status_code == 400
    kinds = asyncio.run(storm(live.url))
    assert kinds.total() == CALLS
    assert min(kinds[kind] for kind in ("plain", "stream", "leave", "slow", "wrong")) > 10
    live.wait_until_idle()
    assert live.get("/health").status_code == 200
    text = live.get("/metrics").text
    assert 'compilations_after_ready_total{engine="0",model_name="tiny"} 0.0' in text
    assert 'num_requests_waiting{engine="0",model_name="tiny"} 0.0' in text
    first, second = (live.complete("ab", temperature=0, max_tokens=9).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


def test_a_reader_that_does_not_read_harms_nobody(live: LiveServer) -> None:
    """Its events do not pile up: the engine is done with it long before it has read them."""
    body = {
        "prompt": ["x"] * 4,
        "max_tokens": 450,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 20,
    }
    with live.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        for _ in range(3):
            assert live.complete("ab", max_tokens=5).status_code == 200
        while live.engine.engine.has_requests:
            assert live.complete("ab", max_tokens=5).status_code == 200
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    live.wait_until_idle()
