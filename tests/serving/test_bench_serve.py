"""The benchmark of servers: what it sends, when, and what it makes of the times."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import LiveServer
from typer.testing import CliRunner

from arctic_jax.serving import cli
from arctic_jax.serving.bench_datasets import Call, arrivals, make_calls
from arctic_jax.serving.bench_serve import Answer, summarize

DOCS = Path(__file__).parents[2] / "docs"


def bench(live: LiveServer, *arguments: str) -> Any:
    line = ["bench", "serve", "--base-url", live.url, "--temperature", "0", *arguments]
    return CliRunner().invoke(cli.app, line, catch_exceptions=False)


@pytest.mark.parametrize("backend", ["vllm", "openai-chat"])
def test_random_prompts(live: LiveServer, tmp_path: Path, backend: str) -> None:
    line = "--num-prompts 6 --random-input-len 20 --random-output-len 5 --max-concurrency 2"
    line += f" --save-detailed --result-dir {tmp_path} --result-filename out.json"
    line += f" --backend {backend} --metric-percentiles 50,90 --goodput ttft:60000"
    host, port = live.url.removeprefix("http://").split(":")
    line += f" --host {host} --port {port} --temperature 0"
    arguments = ["bench", "serve", *line.split(), "--goodput", "tpot:60000 e2el:0.001"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["completed"], report["failed"]) == (6, 0)
    assert report["total_output_tokens"] == 30
    if backend == "vllm":
        assert report["total_input_tokens"] == 120
        assert report["max_concurrent_requests"] <= 2
        assert all(len(gaps) <= 4 for gaps in report["itls"])
    assert report["request_goodput"] == 0
    assert 0 < report["median_ttft_ms"] <= report["p99_ttft_ms"] <= report["p99_e2el_ms"]
    assert report["p90_tpot_ms"] > 0
    assert report["model_id"] == "tiny"
    live.wait_until_idle()


def test_a_trace_is_replayed_at_its_times(live: LiveServer, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000 + 300 * i, "input_length": 10 + i, "output_length": 2, "hash_ids": [7]}
        for i in range(3)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    line = f"--dataset-name trace --dataset-path {trace} --save-detailed --result-dir {tmp_path}"
    assert bench(live, *line.split(), "--result-filename", "out.json").exit_code == 0
    report = json.loads((tmp_path / "out.json").read_text())
    starts = np.diff(report["start_times"])
    assert np.all((starts > 0.25) & (starts < 0.5))
    assert report["input_lens"] == [10, 11, 12]
    assert report["output_lens"] == [2, 2, 2]


def test_files_and_sonnets(tmp_path: Path) -> None:
    options: dict[str, Any] = {"range_ratio": 0, "prefix_len": 0, "seed": 0, "tokenize": str.split}
    file = tmp_path / "custom.jsonl"
    file.write_text('{"prompt": "a", "output_tokens": 3}\n\n{"prompt": "b"}\n{"prompt": "c"}\n')
    calls = make_calls("custom", 3, 1, 9, path=file, **options)
    assert calls == [Call("a", None, 3), Call("b", None, 9)]
    sonnets = make_calls("sonnet", 4, 100, 9, path=None, **options)
    assert len({str(call.prompt) for call in sonnets}) == 4
    assert all(60 < len(str(call.prompt).split()) < 130 for call in sonnets)
    file.write_text("[]\n")
    for name, path, message in (
        ("custom", file, "must hold lines"),
        ("trace", None, "needs --dataset-path"),
        ("sharegpt", None, "must be one of random"),
    ):
        with pytest.raises(ValueError, match=message):
            make_calls(name, 3, 1, 9, path=path, **options)


def test_random_lengths_share_a_prefix() -> None:
    calls = make_calls(
        "random", 50, 100, 20, path=None, range_ratio=0.5, prefix_len=10, seed=1, tokenize=len_ids
    )
    assert len({tuple(call.prompt[:10]) for call in calls}) == 1
    lengths = [len(call.prompt) - 10 for call in calls]
    assert 50 <= min(lengths) < 70
    assert 130 < max(lengths) <= 150
    assert [call.prompt_len for call in calls] == [length + 10 for length in lengths]


def len_ids(text: str) -> list[int]:
    return list(range(len(text) // 10))


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_arrivals(burstiness: float, spread: float) -> None:
    calls = [Call("x", 1, 1)] * 4000
    gaps = np.diff(arrivals(calls, 20, burstiness, seed=0))
    assert np.mean(gaps) == pytest.approx(1 / 20, rel=0.01)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(spread, rel=0.1)
    assert arrivals(calls[:2], float("inf"), 1, seed=0) == [0, 0]


def test_figures() -> None:
    answers = [
        Answer(True, "", 10.0, 0.1, [0.1, 0.3], 0.5, 7, 3),
        Answer(True, "", 10.2, 0.2, [], 0.2, 5, 1),
        Answer(False, "no", 10.0),
    ]
    found = summarize(answers, 2.0, {"ttft": 150.0}, [50.0], ["itl"])
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12, 4)
    assert (found["output_throughput"], found["total_token_throughput"]) == (2.0, 8.0)
    assert (found["request_throughput"], found["request_goodput"]) == (1.0, 0.5)
    assert found["mean_ttft_ms"] == pytest.approx(150)
    assert found["mean_tpot_ms"] == pytest.approx(200)
    assert found["p50_itl_ms"] == pytest.approx(200)
    assert "p50_ttft_ms" not in found
    assert found["max_concurrent_requests"] == 2
    assert found["max_output_tokens_per_s"] == 4


def test_an_unknown_backend() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "serve", "--backend", "tgi"])
    assert result.exit_code == 2
    assert "backend='tgi' is none of vllm, openai, openai-chat" in result.output


def test_a_server_that_is_not_there() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "serve", "--base-url", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert "http://127.0.0.1:9 does not answer" in result.output


def test_the_dashboard_asks_for_what_there_is(live: LiveServer) -> None:
    live.complete("ab", max_tokens=2)
    text = live.get("/metrics").text
    dashboard = (DOCS / "grafana-dashboard.json").read_text("utf-8")
    asked = set(re.findall(r"\$\{prefix\}(\w+)", dashboard))
    assert len(asked) > 20
    per_position = {name for name in asked if name.endswith("_per_pos_total")}  # only with drafts
    for name in asked - per_position:
        assert re.search(rf"^arctic_jax:{name}[ {{]", text, re.MULTILINE) or (
            f"# TYPE arctic_jax:{name.removesuffix('_total')}" in text
        ), name
