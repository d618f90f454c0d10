"""`/v1/embeddings`: texts in, vectors out."""

from __future__ import annotations

import base64
import time
import uuid

import numpy as np

from arctic_jax.embedding.embedder import EmbeddingParams
from arctic_jax.errors import InvalidRequestError
from arctic_jax.serving.metrics import Metrics
from arctic_jax.serving.protocol import Embedding, EmbeddingRequest, EmbeddingResponse, Usage
from arctic_jax.serving.served_model import ServedModel
from arctic_jax.serving.tracing import current_span


async def embed(
    model: ServedModel, metrics: Metrics, request: EmbeddingRequest
) -> EmbeddingResponse:
    """Embed all texts of a call.

    Raises:
        APIError: the model embeds nothing, or too much waits.
        InvalidRequestError: a text or a parameter is out of range.
        EngineDeadError: the engine has failed.
    """
    engine = model.embedding_engine
    model.check_embedding(request)
    length = request.truncate_prompt_tokens
    if length is not None and not (length == -1 or length == model.max_model_len):
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be -1 or {model.max_model_len}, got {length}",
            "truncate_prompt_tokens",
        )
    params = EmbeddingParams(truncate=length is not None, dimensions=request.dimensions)
    began = time.monotonic()
    ticket = model.admission.admit(len(request.input), 0)
    try:
        rows, num_tokens = await engine.embed_counted(request.input, params)
    finally:
        ticket.close()
    metrics.embedded(num_tokens, time.monotonic() - began)
    span = current_span.get()
    if span is not None:
        span.embedded(num_tokens)
    return EmbeddingResponse(
        id=f"embd-{uuid.uuid4().hex}",
        model=model.name,
        data=[
            Embedding(index=i, embedding=_encoded(row, request.encoding_format))
            for i, row in enumerate(rows)
        ],
        usage=Usage(prompt_tokens=num_tokens, total_tokens=num_tokens, completion_tokens=0),
    )


def _encoded(row: np.ndarray, form: str) -> list[float] | str:
    if form == "float":
        return row.tolist()
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
