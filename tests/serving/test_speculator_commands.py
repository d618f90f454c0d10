"""`arctic-jax speculator …`: from prompts to a speculator and its figures."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_speculator import LSTM, REDUCED, SHARING, write_speculator
from typer.testing import CliRunner

from arctic_jax.serving import cli
from arctic_jax.testing import TINY_LLAMA, write_model

SIZES = {
    "input_hidden_dim": TINY_LLAMA["hidden_size"],
    "vocab_size": TINY_LLAMA["vocab_size"],
}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_from_prompts_to_a_speculator(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TINY_LLAMA)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    text, held_back = tmp_path / "text.jsonl", tmp_path / "held_back.jsonl"
    lines = [{"question": f"{i} + 1?"} for i in range(6)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    engine = ("--num-blocks", 16, "--max-model-len", 96, "--max-num-batched-tokens", 64)
    engine += ("--max-num-seqs", 4)
    run(
        *("speculator", "generate", prompts, "--model", base, "--out", text, *engine),
        *("--held-back", held_back, "--held-back-every", 3, "--max-tokens", 12),
    )
    output = run(
        *("speculator", "train", base, text, out, "--inner-size", 24, "--steps", 3),
        *("--max-length", 64, "--dtype", "float32", "--batch-size", 8),
    )
    # Gates 4 · 24 of 64 + 24 + 64 entries, the head's projection, and two norms.
    assert f"{(4 * 24 * (64 + 24 + 64) + 24 * 64 + 4 * 24) / 1e6:.2f} million" in output
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    figures = tmp_path / "figures.json"
    run(
        *("speculator", "evaluate", out / "speculator", held_back, prompts, "--model", base),
        *("--limit", 2, "--max-tokens", 8, "--out", figures, *engine),
    )
    found = json.loads(figures.read_text())["sets"]
    assert {name: found[name]["prompts"] for name in found} == {"held_back": 2, "prompts": 2}
    for counts in found.values():
        assert 8 <= counts["tokens"] <= 16
        assert len(counts["acceptance_by_position"]) == 3
        assert counts["drafted"] > 0
        assert counts["acceptance"] == counts["accepted"] / counts["drafted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "BASE", "none.jsonl", "out", "--kind", "rnn"), "must be lstm or mlp, got 'rnn'"),
        (("evaluate", "BASE", "none.jsonl", "--model", "BASE"), "supported: ['ArcticLSTM"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TINY_LLAMA)
    output = run("speculator", *(str(base) if a == "BASE" else a for a in arguments), code=2)
    assert message in output
    assert "Traceback" not in output


def test_a_reduced_speculator_can_be_evaluated(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TINY_LLAMA)
    whole = write_speculator(tmp_path / "whole", LSTM | SIZES)
    text, reduced = tmp_path / "text.jsonl", tmp_path / "reduced"
    text.write_text(json.dumps({"text": "aaab"}) + "\n")
    output = run(
        *("speculator", "reduce", whole, text, "--size", 2, "--model", base, "--out", reduced)
    )
    assert "knows 2 tokens, 80.00% of those in the text" in output  # a and the end
    output = run(
        *("speculator", "evaluate", reduced, text, "--model", base, "--max-tokens", 8),
        *("--num-blocks", 16, "--max-model-len", 96, "--max-num-batched-tokens", 64),
    )
    counts = json.loads(output[output.index("{") :])["sets"]["text"]
    assert counts["tokens"] == 8
    assert counts["drafted"] > 0


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ("text", "--size", 261), "less than the vocabulary's 261, got 261"),
        ({}, ("text", "--size", 0), "at least 1 and less than the vocabulary's 261, got 0"),
        (SHARING, ("text", "--size", 8), "uses the model's head and has none"),
        (REDUCED, ("text", "--size", 8), "has been reduced to 83 tokens"),
        ({"vocab_size": 97}, ("text", "--size", 8), "a vocabulary of 97, not 261"),
        ({}, ("missing", "--size", 8), "No such file or directory: 'missing'"),
        ({}, ("empty", "--size", 8), "empty: there is no token that counts"),
        ({}, ("text", "bad", "--size", 8), "bad:1: "),
        ({}, ("text", "--size", 8, "--out", "text"), "text already exists"),
    ],
)
def test_what_cannot_be_reduced_is_said_in_one_line(
    changes: dict[str, Any],
    arguments: tuple[Any, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model("base", TINY_LLAMA)
    write_speculator(Path("whole"), LSTM | SIZES | changes)
    Path("text").write_text(json.dumps({"text": "aaab"}))
    Path("bad").write_text("{}")
    Path("empty").touch()
    before = set(tmp_path.iterdir())
    given = ("speculator", "reduce", "whole", "--model", "base", "--out", "out", *arguments)
    output = run(*given, code=2)
    assert message in output
    assert "Traceback" not in output
    assert set(tmp_path.iterdir()) == before
