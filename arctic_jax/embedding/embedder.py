"""`Embedder`: an embedding model in this process, from texts to float32 rows.

A pipeline of three: a thread tokenizes the next texts and the caller's packs the next batches while
the device computes the last ones.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax import Array

from arctic_jax import host_copies
from arctic_jax.config import EngineConfig
from arctic_jax.embedding.packing import Packer, Plan
from arctic_jax.embedding.runner import EncoderRunner
from arctic_jax.embedding.settings import EmbeddingSettings
from arctic_jax.embedding.text_encoder import Encoded, Text, TextEncoder
from arctic_jax.errors import InvalidRequestError, UnsupportedModelError
from arctic_jax.loading.model_files import ModelFiles, open_model
from arctic_jax.loading.orbax_checkpoint import OrbaxCheckpoint
from arctic_jax.models.registry import encoder_class
from arctic_jax.progress import Report, silent

CHUNK_TEXTS = 1024  # tokenized at once, or fewer:
CHUNK_CHARACTERS = 100_000  # some 20,000 tokens
FIRST_CHARACTERS = 12_500  # the device waits for the first chunk; each is twice the one before
TOKENIZING_THREADS = 2  # while one's ids become lists, another's are found, by threads without GIL
MAX_IN_FLIGHT = 2  # batches: one computes while the next is staged


@dataclass(frozen=True)
class EmbeddingParams:
    """How texts are embedded.

    Attributes:
        prompt_name: of a prompt of the model's ("query", "document") to put before each text.
        prompt: a prompt of one's own instead.
        truncate: cut texts that are longer than the model takes; else they are errors.
        dimensions: keep the first so many, scaled to the length 1 again if the model's vectors have
            it (Matryoshka embeddings: Kusupati et al. 2022); `None` for all.
    """

    prompt_name: str | None = None
    prompt: str | None = None
    truncate: bool = True
    dimensions: int | None = None


class Embedder:
    """An embedding model.

    Args:
        config: what the user set: `load`, and `scheduler.max_num_batched_tokens`.
        report: told how far downloading, loading and compiling are.
        files: an opened model, for those who have one; else `config.load.model` is resolved.

    Raises:
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
        ValueError: an option does not fit the model.
    """

    def __init__(
        self, config: EngineConfig, report: Report = silent, files: ModelFiles | None = None
    ) -> None:
        files = files or open_model(config.load, report)
        if isinstance(files.checkpoint, OrbaxCheckpoint):
            raise UnsupportedModelError("an Orbax checkpoint of an encoder")
        cls = encoder_class(files.config)
        model_config = cls.config_from_hf(files.config)
        settings = EmbeddingSettings()
        if files.directory is not None:
            settings = EmbeddingSettings.read(files.directory)
        self.tokenizer = files.tokenizer
        self.runner = EncoderRunner(
            config.load,
            config.scheduler.max_num_batched_tokens,
            cls,
            model_config,
            settings,
            files.checkpoint,
            report,
        )
        self.text_encoder = TextEncoder(
            files.tokenizer.backend, self.runner.max_length, model_config.vocab_size
        )
        self._tokenizing = ThreadPoolExecutor(
            TOKENIZING_THREADS, thread_name_prefix="arctic-jax-tokenizer"
        )

    @property
    def dimension(self) -> int:
        """Numbers of a vector."""
        return self.runner.dimension

    def embed(
        self,
        texts: Sequence[Text],
        params: EmbeddingParams | None = None,
        *,
        on_error: Literal["raise", "nan"] = "raise",
        report: Report = silent,
    ) -> np.ndarray:
        """Return a row for each text, in their order, float32 `[texts, dimensions]`.

        Args:
            texts: any number of them.
            params: how.
            on_error: what a text comes to that cannot be embedded: an error for all, or a row of
                NaN for it alone.
            report: told how many are done.

        Raises:
            InvalidRequestError: a parameter is out of range, or (with `"raise"`) a text.
        """
        params = params or EmbeddingParams()
        prompt, dimensions = self.check(params)
        rows = np.empty((len(texts), self.dimension), np.float32)
        in_flight: collections.deque[tuple[Plan, Array]] = collections.deque()
        done = 0

        def collect(most: int) -> None:
            """Wait for the oldest batches until no more than so many are left."""
            nonlocal done
            while len(in_flight) > most:
                plan, vectors = in_flight.popleft()
                rows[list(plan.lengths)] = host_copies.finish(vectors)[: len(plan.lengths)]
                done += len(plan.lengths)
                report("Embedding", done, len(texts))

        def is_idle() -> bool:
            return all(host_copies.is_ready(vectors) for _, vectors in in_flight)

        packer, waiting, encoded = Packer(self.runner.ladder), {}, 0
        for chunk in self._encode(texts, prompt, params.truncate):
            for number, ids in enumerate(chunk, encoded):
                if not isinstance(ids, InvalidRequestError):
                    waiting[number] = ids
                    packer.add([(number, len(ids))])
                    continue
                if on_error == "raise":
                    message = f"text {number}: {ids}"
                    raise InvalidRequestError(message, ids.parameter) from ids
                rows[number] = np.nan
                done += 1
            encoded += len(chunk)
            is_last = encoded == len(texts)
            while plan := packer.take(rest=is_last, idle=is_idle()):
                in_flight.append((plan, self.launch(plan, waiting)))
                collect(MAX_IN_FLIGHT)
        collect(0)
        return self.shorten(rows, dimensions)

    def check(self, params: EmbeddingParams) -> tuple[str, int]:
        """Return the prompt and the number of dimensions that parameters mean.

        Raises:
            InvalidRequestError: one is out of range.
        """
        if params.prompt is not None and params.prompt_name is not None:
            raise InvalidRequestError("give prompt or prompt_name, not both", "prompt")
        prompt = params.prompt
        if prompt is None:
            prompt = self.runner.settings.prompt(params.prompt_name)
        dimensions = params.dimensions if params.dimensions is not None else self.dimension
        if isinstance(dimensions, bool) or not isinstance(dimensions, int):
            raise InvalidRequestError(f"dimensions must be an integer, got {dimensions!r}")
        if not 1 <= dimensions <= self.dimension:
            raise InvalidRequestError(
                f"dimensions must be 1 to {self.dimension}, got {dimensions}", "dimensions"
            )
        return prompt, dimensions

    def launch(self, plan: Plan, waiting: dict[int, Sequence[int]]) -> Array:
        """Start a batch, taking its token ids out of `waiting`; see `EncoderRunner.launch`."""
        windows = [[waiting.pop(number) for number in window] for window in plan.windows]
        return self.runner.launch(windows, plan.bucket)

    def shorten(self, rows: np.ndarray, dimensions: int) -> np.ndarray:
        """Keep the first `dimensions` of `rows [texts, dimension]`."""
        if dimensions == self.dimension:
            return rows
        rows = np.ascontiguousarray(rows[:, :dimensions])
        if self.runner.settings.normalize:
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return rows

    def _encode(
        self, texts: Sequence[Text], prompt: str, truncate: bool
    ) -> Iterator[Sequence[Encoded]]:
        """Yield the token ids chunk by chunk, others tokenized while one is worked on."""
        chunks = _chunks(texts)

        def encode(chunk: Sequence[Text]) -> Sequence[Encoded]:
            return self.text_encoder.encode(chunk, prompt, truncate=truncate)

        first = list(itertools.islice(chunks, 2))
        if len(first) == 1:  # nothing to overlap: no hand-over
            yield encode(first[0])
            return
        ahead: collections.deque[Future[Sequence[Encoded]]] = collections.deque()
        for chunk in itertools.chain(first, chunks):
            ahead.append(self._tokenizing.submit(encode, chunk))
            if len(ahead) > 2 * TOKENIZING_THREADS:
                yield ahead.popleft().result()
        for job in ahead:
            yield job.result()


def _chunks(texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    """Cut texts into what is tokenized at once."""
    begin, characters, most = 0, 0, FIRST_CHARACTERS
    for end, text in enumerate(texts):
        size = len(text) if isinstance(text, str) else 0
        if end - begin == CHUNK_TEXTS or (end > begin and characters + size > most):
            yield texts[begin:end]
            begin, characters, most = end, 0, min(2 * most, CHUNK_CHARACTERS)
        characters += size
    if begin < len(texts):
        yield texts[begin:]
