"""The real all-MiniLM-L6-v2 against sentence-transformers."""

import json
from pathlib import Path

import numpy as np
import pytest

from arctic_jax.config import EngineConfig
from arctic_jax.embedding.embedder import Embedder
from arctic_jax.errors import ModelNotFoundError
from arctic_jax.loading.hub import EMBEDDING_MODEL, resolve_model

GOLDENS = Path(__file__).parents[1] / "goldens"
SENTENCES = json.loads((GOLDENS / "minilm_sentences.json").read_text("utf-8"))
EXPECTED = dict(np.load(GOLDENS / "minilm_vectors.npz"))


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(resolve_model(EMBEDDING_MODEL))
    except ModelNotFoundError as error:
        pytest.skip(f"the packaged model cannot be had here: {error}")


def test_texts_are_tokenized_like_sentence_transformers_does(model: str) -> None:
    embedder = Embedder(EngineConfig.from_keywords(model=model, max_num_batched_tokens=256))
    ids = embedder.text_encoder.encode(SENTENCES)
    assert list(map(len, ids)) == EXPECTED["lengths"].tolist()
    assert len(ids) == 100
    assert EXPECTED["lengths"].max() == 256  # which is where the model cuts


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.999)])
def test_vectors_point_where_those_of_sentence_transformers_do(
    model: str, dtype: str, least: float
) -> None:
    embedder = Embedder(
        EngineConfig.from_keywords(model=model, dtype=dtype, max_num_batched_tokens=256)
    )
    rows = embedder.embed(SENTENCES)
    cosines = (rows * EXPECTED["vectors"]).sum(1) / np.linalg.norm(rows, axis=1)
    assert cosines.min() >= least
