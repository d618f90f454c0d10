"""`arctic-jax swiftkv …` and `evaluate`: from prompts to a student and its figures."""

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


def test_from_prompts_to_a_student(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TINY_LLAMA)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    text, held_back = tmp_path / "text.jsonl", tmp_path / "held_back.jsonl"
    lines = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    engine = ("--num-blocks", 32, "--max-model-len", 128, "--max-num-seqs", 4)
    run(
        *("swiftkv", "generate", prompts, "--model", base, "--out", text, *engine),
        *("--held-back", held_back, "--held-back-every", 3, "--max-tokens", 12),
    )
    assert [len(path.read_text().splitlines()) for path in (text, held_back)] == [6, 3]
    output = run(
        *("swiftkv", "distill", base, text, out, "--num-key-value-layers", 1, "--steps", 3),
        *("--max-length", 64, "--dtype", "float32", "--schedule", "constant"),
    )
    assert "model is ready" in output
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    figures = tmp_path / "figures.json"
    run(
        *("evaluate", "--model", out / "model", "--teacher", base, "--data", held_back),
        *("--max-length", 64, "--gsm8k", prompts, "--limit", 2, "--out", figures, *engine),
    )
    found = json.loads(figures.read_text())
    assert found["text"]["held_back.jsonl"]["tokens"] > 3
    assert 0 <= found["text"]["held_back.jsonl"]["agreement"] <= 1
    assert found["gsm8k"]["problems"] == 2
    own = out / "swiftkv.safetensors"
    student = tmp_path / "student"
    run("swiftkv", "convert", base, student, "--num-key-value-layers", 1, "--parameters", own)
    assert json.loads((student / "config.json").read_text())["num_key_value_layers"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate",), "nothing to do: give --teacher and --data"),
        (("evaluate", "--teacher", "a"), "nothing to do"),
        (
            ("swiftkv", "distill", "BASE", "none.jsonl", "out", "--num-key-value-layers", "2"),
            "with 2 lower layers there is nothing to train",
        ),
        (
            ("swiftkv", "convert", "BASE", "out", "--num-key-value-layers", "9"),
            "num_key_value_layers 9 is not between 1 and num_hidden_layers 2",
        ),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TINY_LLAMA)
    output = run(*(str(base) if a == "BASE" else a for a in arguments), code=2)
    assert message in output
    assert "Traceback" not in output
