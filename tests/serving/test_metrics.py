"""Each of several equal engines has figures of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, serve
from prometheus_client.parser import text_string_to_metric_families

from arctic_jax.serving.async_engine import AsyncEngine


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[LiveServer]:
    """A server of two engines."""
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "block_size": 16, "num_blocks": 64}
    engine = AsyncEngine(str(tiny_model), data_parallel_size=2, **options)
    with serve(engine) as server:
        yield server
        server.wait_until_idle()
    engine.shutdown()


def by_engine(server: LiveServer, sample: str, **labels: str) -> list[float]:
    """A figure of each engine, in their order."""
    found = {
        int(s.labels["engine"]): s.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for s in family.samples
        if s.name == f"arctic_jax:{sample}" and labels.items() <= s.labels.items()
    }
    assert sorted(found) == list(range(len(found)))
    return [found[i] for i in range(len(found))]


def test_each_engine_has_its_own_figures(pair: LiveServer) -> None:
    prompts = [[5] * 3, [6] * 4, [7] * 5, [8] * 6]
    answer = pair.complete(prompts, max_tokens=7, n=2, ignore_eos=True)
    usage = answer.json()["usage"]
    pair.wait_until_idle()
    # One after the other they go to the engine with the fewest: it has half of them.
    assert by_engine(pair, "request_success_total", finished_reason="length") == [4, 4]
    assert by_engine(pair, "generation_tokens_total") == [28, 28]
    assert sum(by_engine(pair, "prompt_tokens_total")) == usage["prompt_tokens"] == 18
    assert min(by_engine(pair, "prompt_tokens_total")) >= 7
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert by_engine(pair, f"{name}_count") == [2, 2]
    assert by_engine(pair, "request_generation_tokens_sum") == [28, 28]
    assert all(n >= 7 for n in by_engine(pair, "iteration_tokens_total_count"))
    assert by_engine(pair, "iteration_tokens_total_count") == by_engine(
        pair, "steps_total", layout="shift"
    )
    assert by_engine(pair, "num_requests_running") == [0, 0]


def test_what_nobody_waited_for_is_counted(pair: LiveServer) -> None:
    """Tokens and ends of calls that their clients left."""
    tokens = sum(by_engine(pair, "generation_tokens_total"))
    body = {"prompt": ["ab", "cd"], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with pair.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
    pair.wait_until_idle()
    assert by_engine(pair, "request_success_total", finished_reason="abort") == [1, 1]
    assert tokens < sum(by_engine(pair, "generation_tokens_total")) < tokens + 800
