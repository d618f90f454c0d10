"""How good a model is: against its teacher on given text, and on grade-school mathematics."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax.config import LoadConfig, ModelConfig
from arctic_jax.llm import LLM
from arctic_jax.loading.model_files import ModelFiles, open_model
from arctic_jax.models.registry import model_class
from arctic_jax.progress import Report, silent
from arctic_jax.request import SamplingParams
from arctic_jax.training import data
from arctic_jax.training.forward import Batch, Weights, hidden_states
from arctic_jax.training.loop import load_weights
from arctic_jax.training.losses import Comparison, compare
from arctic_jax.training.swiftkv_checkpoint import STUDENTS, original_weights

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def compare_on_text(
    load: LoadConfig,
    teacher: LoadConfig,
    data_files: Sequence[Path],
    max_length: int = 2048,
    batch_size: int = 8,
    report: Report = silent,
) -> dict[str, dict[str, float]]:
    """Compare a model with another on the tokens that count of each file (see `data`).

    Both have the same vocabulary and output projection, as a student and its teacher have.

    Returns:
        By the file's name: `tokens` that counted, `perplexity`, `teacher_perplexity`, their
        `perplexity_ratio`, the
        `kl` divergence from the teacher in nats a token, and `agreement`, the share of tokens of
        which both models think the same the likeliest.

    Raises:
        ValueError: the vocabularies differ, or the data do not fit.
        UnsupportedModelError: an architecture that `forward` has not.
    """
    files, files_of_teacher = open_model(load, report), open_model(teacher, report)
    dtype = load.dtype if load.dtype != "auto" else _usual_dtype()
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()[:1]), ("data",)), PartitionSpec())
    model, other = _open(files, dtype, sharding), _open(files_of_teacher, dtype, sharding)
    if model[1].vocab_size != other[1].vocab_size:
        raise ValueError(
            f"vocabularies of {model[1].vocab_size} and {other[1].vocab_size} cannot be compared"
        )

    @jax.jit
    def sums(weights: Weights, weights_of_teacher: Weights, batch: Batch) -> Comparison:
        last = hidden_states(weights, model[1], batch).last
        last_of_teacher = hidden_states(weights_of_teacher, other[1], batch).last
        return compare(weights, model[1], batch, last_of_teacher, last)

    results = {}
    for data_file in data_files:
        rows = data.read_rows(data_file, files.tokenizer, max_length)
        total: dict[str, float] = {}
        starts = range(0, len(rows), batch_size)
        for number, start in enumerate(starts, 1):
            batch = _padded(rows, np.arange(start, min(start + batch_size, len(rows))), batch_size)
            found = asdict(jax.device_get(sums(model[0], other[0], batch)))
            total = {name: total.get(name, 0.0) + float(value) for name, value in found.items()}
            report(f"Comparing {data_file.name}", number, len(starts))
        results[data_file.name] = _averages(total)
    return results


def _averages(total: dict[str, float]) -> dict[str, float]:
    tokens = total["tokens"]
    perplexities = [math.exp(total[f"{who}_nll"] / tokens) for who in ("student", "teacher")]
    return {
        "tokens": tokens,
        "perplexity": perplexities[0],
        "teacher_perplexity": perplexities[1],
        "perplexity_ratio": perplexities[0] / perplexities[1],
        "kl": total["divergence"] / tokens,
        "agreement": total["agreement"] / tokens,
    }


def _open(
    files: ModelFiles, dtype: str, sharding: NamedSharding
) -> tuple[dict[str, Array], ModelConfig]:
    known = {*STUDENTS, *(student for student, _ in STUDENTS.values())}
    names = files.config.get("architectures") or []
    if not known.issuperset(names):
        raise ValueError(f"architectures {names} cannot be compared, only {sorted(known)}")
    config = model_class(files.config).config_from_hf(files.config)
    return load_weights(original_weights(files), dtype, sharding), config


def _padded(rows: data.Rows, chosen: np.ndarray[Any, Any], size: int) -> Batch:
    """Return some rows, and empty ones up to `size`: one shape is compiled."""
    missing = size - len(chosen)
    return Batch(
        **{
            name: jnp.asarray(np.pad(value, ((0, missing), (0, 0))))
            for name, value in rows.fields(chosen).items()
        }
    )


def _usual_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def gsm8k(
    llm: LLM, data_file: Path, limit: int | None = None, max_tokens: int = 400
) -> dict[str, float]:
    """Let the engine answer grade-school problems (Cobbe et al. 2021), greedily, without examples.

    Args:
        llm: the model.
        data_file: JSON lines with `question` and `answer`, which ends with `#### number`.
        limit: so many problems; `None` for all.
        max_tokens: of an answer.

    Returns:
        `problems`, and `exact_match`: the share whose last number is the right one.
    """
    lines = data_file.read_text("utf-8").splitlines()[:limit]
    problems = [json.loads(line) for line in lines if line.strip()]
    questions = [[{"role": "user", "content": problem["question"]}] for problem in problems]
    outputs = llm.chat(questions, SamplingParams(temperature=0, max_tokens=max_tokens))
    right = [
        last_number(output.outputs[0].text) == last_number(problem["answer"])
        for output, problem in zip(outputs, problems, strict=True)
    ]
    return {"problems": len(right), "exact_match": sum(right) / len(right)}


def last_number(text: str) -> float | None:
    """Return the last number of a text, thousands separators left out."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
