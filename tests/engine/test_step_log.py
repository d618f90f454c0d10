"""Every step is counted, and written down if somebody wants it."""

import json
from pathlib import Path

import pytest
from tiny_engine import GREEDY, make_engine, run

from arctic_jax.engine.step_log import StepLog, padding


def test_steps_of_a_request(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    engine = make_engine(step_log=str(path))
    engine.add_request("a", [1] * 40, GREEDY)
    run(engine)
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert [step["num_tokens"] for step in steps] == [32, 8] + [1] * (GREEDY.max_tokens - 1)
    assert all(step["num_padded_tokens"] >= step["num_tokens"] for step in steps)
    assert all(step["ms"] > 0 and step["layout"] == "shift" for step in steps)
    totals = engine.step_log.totals["shift"]
    assert (totals.steps, totals.tokens) == (len(steps), 40 + GREEDY.max_tokens - 1)
    padded = sum(step["num_padded_tokens"] for step in steps)
    assert padding(engine.step_logs) == pytest.approx(1 - totals.tokens / padded)


def test_times_of_overlapping_steps_add_up() -> None:
    log = StepLog()
    assert padding([log]) == 0
    for _ in range(2):  # both were launched long ago: the second began when the first was done
        log.add(0.0, "shift", 1, 3, 1, 4)
    totals = log.totals["shift"]
    assert (totals.steps, totals.tokens, totals.rows, totals.padded_tokens) == (2, 6, 2, 8)
    before = totals.seconds
    log.add(0.0, "shift", 1, 3, 1, 4)
    assert log.totals["shift"].seconds - before < 1


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        StepLog(tmp_path / "nowhere" / "steps.jsonl")
