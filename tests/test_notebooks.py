"""The notebooks: what is stored in them, and that they run from top to bottom."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 500_000
# What a notebook claims of itself, as it must be printed by any run of it.
CLAIMS = {
    "quickstart": ["Paris", "the same seed, the same text: True"],
    "embeddings": ["all of length 1: True"],
    "pallas_kernel": [
        r"as it is +error 0\.000, races 0$",
        r"without barrier_wait +error 0\.000, races [1-9]",
        r"without commit_smem +error 0\.000, races [1-9]",
        "6 of 6 rows within their tolerance",
        r"\['mosaic_gpu_v2'\]",
    ],
    "shift_parallelism": [
        r"the same device: True \| the same head: True",
        r"([\d,]+) of \1 bytes of the shift layout lie inside",
        "'ulysses': [1-9]",
        "the cache is where it was: True",
        "14 of 14 answers are the same",
    ],
    "speculative_decoding": ["the answers are those without speculation: True"],
    "swiftkv": [
        r"smollm2-135m-instruct-swiftkv: all tokens in 15 of 30 layers",
        r"15 layers, shipped +agreement 0\.[789]",
        "distillation helped: True",
    ],
}
SHORT = ("quickstart", "embeddings", "pallas_kernel")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(output.text for output in outputs if output.output_type == "stream")


def missing_claims(name: str, text: str) -> list[str]:
    return [claim for claim in CLAIMS[name] if not re.search(claim, text, re.MULTILINE)]


def test_every_notebook_is_known_here():
    assert {path.stem for path in NOTEBOOKS} == CLAIMS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path):
    """The outputs are those of one clean run, say nothing of a machine, and are small."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    install, *others = code_cells(notebook)
    assert "install" in install.metadata.get("tags", [])
    assert not install.outputs
    assert [cell.execution_count for cell in others] == list(range(1, len(others) + 1))
    outputs = [output for cell in others for output in cell.outputs]
    kinds = {"stream", "display_data", "execute_result"}
    assert {output.output_type for output in outputs} <= kinds
    assert [o.text for o in outputs if o.output_type == "stream" and o.name != "stdout"] == []
    shown = str([output.get("data", {}).get("text/plain", "") for output in outputs])
    machine = r"/(home|root|tmp|work|Users|usr)/|https?://|ipykernel_"
    assert re.search(machine, printed(notebook) + shown) is None
    assert missing_claims(path.stem, printed(notebook)) == []
    assert path.stat().st_size < MAX_BYTES


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in SHORT else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
)
def test_it_runs(path, tmp_path):
    """A run shows what is stored, cell by cell, but for the figures in it."""
    script = [sys.executable, ROOT / "scripts" / "run-notebooks", "--out", tmp_path, path]
    done = subprocess.run(script, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    stored = code_cells(nbformat.read(path, as_version=4))
    ran = nbformat.read(tmp_path / path.name, as_version=4)
    for before, now in zip(stored, code_cells(ran), strict=True):
        kinds = [[sorted(o.get("data", [o.get("name")])) for o in c.outputs] for c in (before, now)]
        assert kinds[0] == kinds[1], now.source
    assert missing_claims(path.stem, printed(ran)) == []
