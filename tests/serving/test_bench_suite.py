"""The suite of benchmarks: its parts, what happens to one that fails, what is told of figures."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arctic_jax.serving import bench_report, bench_suite
from arctic_jax.serving.bench import app
from arctic_jax.serving.bench_suite import Machine, Part

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys, time
print("hello")
open("pid", "w").write(str(os.getpid()))
if "--fail" in sys.argv: sys.exit(3)
if "--sleep" in sys.argv: time.sleep(60)
calls = open("calls", "a"); calls.write("x")
open("path", "w").write(os.environ["PYTHONPATH"])
json.dump({"device": "cpu", "date": "2026-01-02", "tok_s": 5.0}, open(sys.argv[-1], "w"))
"""


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With benchmarks that take no time."""
    folder = tmp_path / "checkout"
    (folder / "benchmarks").mkdir(parents=True)
    for name in ("offline", "embeddings"):
        (folder / "benchmarks" / f"{name}.py").write_text(SCRIPT)
    monkeypatch.setattr(bench_suite, "CHECKOUT", folder)
    monkeypatch.setattr(bench_suite, "find_machine", lambda: Machine("cpu", "cpu", 1))
    parts = [Part("offline_a", "offline", ["--x", 1]), Part("embeddings", "embeddings", [])]
    monkeypatch.setattr(bench_suite, "parts_for", lambda machine, data: list(parts))
    return folder


def test_parts_run_once(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        code, output = invoke("suite", "--out", out)
        assert code == 0, output
        assert (checkout / "calls").read_text() == "xx"
    assert "offline_a" in (out / "report.html").read_text()
    result = json.loads((out / "offline_a.json").read_text())
    assert result["seconds"] > 0
    assert result["command"] == "python benchmarks/offline.py --x 1 --out offline_a.json"
    (out / "offline_a.json").unlink()
    assert invoke("suite", "--out", out, "--only", "off")[0] == 0
    assert (checkout / "calls").read_text() == "xxx"
    assert invoke("suite", "--out", out, "--only", "nothing")[0] == 2


def test_packages_of_the_user_are_found(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert invoke("suite", "--out", tmp_path / "out")[0] == 0
    assert (checkout / "path").read_text().split(os.pathsep) == [str(checkout), str(tmp_path)]


@pytest.mark.parametrize(("option", "why"), [("--fail", "code 3"), ("--sleep", "not done after")])
def test_a_part_that_fails_leaves_no_figures(
    option: str, why: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Part("bad", "offline", [option], minutes=0.03)
    good = Part("good", "offline", [])
    monkeypatch.setattr(bench_suite, "parts_for", lambda machine, data: [bad, good])
    code, output = invoke("suite", "--out", tmp_path / "out")
    assert code == 1
    assert why in output
    assert (tmp_path / "out" / "bad.log").read_text() == "hello\n"
    assert sorted(p.name for p in (tmp_path / "out").glob("*.json")) == ["good.json"]


def test_kill_ends_the_part(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [Part("long", "offline", ["--sleep"]), Part("next", "offline", [])]
    monkeypatch.setattr(bench_suite, "parts_for", lambda machine, data: parts)
    own = signal.signal(signal.SIGTERM, lambda *_: None)  # or the signal would end the tests
    pid = checkout / "pid"

    def kill() -> None:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        code, output = invoke("suite", "--out", tmp_path / "out")
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, own)
    assert code == 130
    assert "goes on with the part" in output
    assert not list((tmp_path / "out").glob("*.json"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_suite, "CHECKOUT", tmp_path)
    code, _ = invoke("suite", "--out", tmp_path / "out")
    assert code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "machine", [Machine("cpu", "cpu", 1), Machine("gpu", "H200", 1), Machine("gpu", "H200", 4)]
)
def test_every_part_is_a_script_with_such_options(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "agent_trajectories").mkdir()
    (tmp_path / "agent_trajectories" / "tokenizer.json").write_text("{}")
    parts = bench_suite.parts_for(machine, tmp_path)
    assert len({part.name for part in parts}) == len(parts) > 3
    for part in parts:
        source = (ROOT / "benchmarks" / f"{part.script}.py").read_text()
        options = [str(option) for option in part.command(tmp_path / "x.json")]
        assert [o for o in options if o.startswith("--") and f'"{o}"' not in source] == []
        configs = [o for o in options if o.startswith("benchmarks/configs")]
        assert [name for name in configs if not (ROOT / name / "config.json").is_file()] == []


def test_figures_are_numbers_with_units() -> None:
    result: dict[str, Any] = {
        "ready_s": 4.0,
        "num_blocks": 7,
        "latency": [{"batch": 2, "tpot_ms": 3.0, "steps": 9}, {"batch": 4, "tpot_ms": 5}],
        "ratios": {"prefill": 1.5},
        "rows": [{"case": "a", "us": 2.0, "gb_per_s": 1.0, "drafted": 4}],
        "settings": {"min_ms": 1.0},
    }
    found = dict(bench_report.figures_of(result))
    assert {name: (figure.value, figure.sign) for name, figure in found.items()} == {
        "latency [batch 2] tpot_ms": (3.0, -1),
        "latency [batch 4] tpot_ms": (5.0, -1),
        "ratios prefill": (1.5, 1),
        "rows [a] us": (2.0, -1),
        "rows [a] gb_per_s": (1.0, 1),
    }


def write(folder: Path, device: str = "cpu", **figures: Any) -> Path:
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"device": device, "date": "2026-01-01", **figures}))
    return folder


def test_a_loss_beyond_noise_fails(tmp_path: Path) -> None:
    rows = [{"batch": 8, "tpot_ms": 10.0}]
    before = write(tmp_path / "before", tok_s=100.0, rows=rows, gone_ms=1.0)
    same = write(tmp_path / "same", tok_s=97.0, rows=[{"batch": 8, "tpot_ms": 10.3}])
    slower = write(tmp_path / "slower", tok_s=150.0, rows=[{"batch": 8, "tpot_ms": 12.0}])
    assert invoke("compare", before, same)[0] == 0
    code, output = invoke("compare", before, slower)
    assert code == 1
    assert "a: rows [batch 8] tpot_ms" in output
    assert "-16.7%" in output
    assert "+50.0%" in output
    assert invoke("compare", before, slower, "--tolerance", 0.2)[0] == 0
    other = write(tmp_path / "other", device="H200", tok_s=100.0)
    assert invoke("compare", before, other)[0] == 2
    with pytest.raises(ValueError, match="different devices"):
        bench_report.compare(bench_report.read(before), bench_report.read(other))
    one, two = (
        write(tmp_path / name, host={"processor": name, "cores": 2}, tok_s=1.0) for name in "AB"
    )
    with pytest.raises(ValueError, match=r"is of A, 2 cores, .* of B, 2 cores"):
        bench_report.compare(bench_report.read(one), bench_report.read(two))
    with pytest.raises(ValueError, match="has no figures"):
        bench_report.read(tmp_path)


def test_a_report_of_one_run(tmp_path: Path) -> None:
    """It has a picture of what was measured in several cases."""
    latency = [{"batch": 1, "tpot_ms": 3.0}, {"batch": 8, "tpot_ms": 5.0}]
    folder = write(tmp_path / "a", latency=latency, ratios={"prefill": 1.5, "ttft": 1.2}, tok_s=9.0)
    assert bench_report.write(folder).read_text().count("<svg") == 2


def test_a_report_of_what_is_committed(tmp_path: Path) -> None:
    """With the peers that were recorded for that machine."""
    source = ROOT / "benchmarks" / "results" / "h200" / "suite"
    for path in source.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page = bench_report.write(tmp_path, [source]).read_text()
    assert "vLLM 0.26" in page
    assert page.count("<svg") > 3
    now = bench_report.read(source)
    for peer in json.loads(bench_report.PEERS.read_text()):
        if peer["part"] in now.parts:
            assert peer["figure"] in now.parts[peer["part"]]
