"""`arctic-jax speculator …`: from prompts to a speculator and its figures."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from arctic_jax.serving import cli
from arctic_jax.testing import TINY_LLAMA, write_model


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
