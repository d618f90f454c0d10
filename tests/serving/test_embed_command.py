"""`arctic-jax embed`, through the command line, and `LLM.embed` behind it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_encoder
from typer.testing import CliRunner

from arctic_jax import LLM
from arctic_jax.serving import embedding
from arctic_jax.serving.cli import app

TEXTS = ["one", "two words", "日本語"]
OPTIONS = ["--max-model-len", "64", "--max-num-batched-tokens", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), progress=False, max_model_len=64, max_num_batched_tokens=64)


def call(model: Path, input: Path, output: Path, *options: str) -> str:
    files = ["--input", str(input), "--output", str(output)]
    result = CliRunner().invoke(app, ["embed", "--model", str(model), *files, *OPTIONS, *options])
    return result.output if result.exit_code == 0 else f"exit {result.exit_code}: {result.output}"


def test_a_jsonl_file_becomes_rows(model: Path, llm: LLM, tmp_path: Path) -> None:
    lines = [json.dumps(TEXTS[0]), "", *(json.dumps({"body": text}) for text in TEXTS[1:])]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    said = call(model, tmp_path / "in.jsonl", tmp_path / "out.npy", "--field", "body")
    assert "3 vectors of 32" in said
    rows = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(rows, llm.embed(TEXTS, use_tqdm=False), atol=2e-6)


def test_a_text_file_and_options(model: Path, llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    options = ["--dimensions", "8", "--prompt-name", "query"]
    call(model, tmp_path / "in.txt", tmp_path / "out.npy", *options)
    wanted = llm.embed(TEXTS, dimensions=8, prompt_name="query", use_tqdm=False)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, atol=2e-6)


def test_bad_texts(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"good"\n7\n')
    said = call(model, tmp_path / "in.jsonl", tmp_path / "out.npy")
    assert said.startswith("exit 2")
    assert not (tmp_path / "out.npy").exists()
    said = call(model, tmp_path / "in.jsonl", tmp_path / "out.npy", "--skip-errors")
    assert "1 of them NaN" in said
    rows = np.load(tmp_path / "out.npy")
    assert np.isnan(rows).any(1).tolist() == [False, True]


@pytest.mark.parametrize("line", ["{", '{"other": "x"}'])
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(f'"good"\n{line}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2"):
        list(embedding.read_texts(tmp_path / "in.jsonl", "text"))


def test_another_ending_is_refused_at_once(tmp_path: Path) -> None:
    assert call(tmp_path, tmp_path / "in.jsonl", tmp_path / "out.csv").startswith("exit 2")


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    embedding.write_rows(tmp_path / "out.parquet", rows)
    column = parquet.read_table(tmp_path / "out.parquet")["embedding"]
    np.testing.assert_array_equal(np.stack(column.to_numpy()), rows)


def test_an_embedding_model_generates_nothing(llm: LLM, model: Path) -> None:
    with pytest.raises(ValueError, match=f"{model} is an embedding model"):
        llm.generate(["Hello"])
    assert llm.get_tokenizer()("ab")["input_ids"] == [97, 98]


def test_one_text_is_one_row(llm: LLM) -> None:
    one = llm.embed("one", use_tqdm=False)
    assert one.shape == (1, 32)
    np.testing.assert_allclose(llm.embed(list(b"one"), use_tqdm=False), one, atol=2e-6)
