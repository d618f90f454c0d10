"""`EmbeddingEngine`: embeddings for programs that run an event loop, many small requests at once.

Two threads behind the event loop: one collects requests and tokenizes them together, the other owns
the packer, launches batches and hands out rows. Requests that arrive while a batch runs share the
next one.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import Array

from arctic_jax import host_copies
from arctic_jax.config import EngineConfig
from arctic_jax.embedding.embedder import MAX_IN_FLIGHT, Embedder, EmbeddingParams
from arctic_jax.embedding.packing import Packer, Plan
from arctic_jax.embedding.text_encoder import Encoded, Text
from arctic_jax.errors import EngineDeadError, InvalidRequestError
from arctic_jax.progress import bars

logger = logging.getLogger(__name__)

PART_TEXTS = 256  # of a large request: others get their turn between parts
MAX_COLLECTED = 1024  # texts that are tokenized together


@dataclass(eq=False)
class _Part:
    """Some texts of a request, and where their vectors go."""

    texts: Sequence[Text]
    prompt: str
    truncate: bool
    dimension: int
    done: Future[np.ndarray] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.rows = np.empty((len(self.texts), self.dimension), np.float32)
        self.missing = len(self.texts)
        self.lengths: dict[int, int] = {}  # of those that wait for a batch, by number

    def fail(self, error: BaseException) -> None:
        """Tell who waits, if anybody still does."""
        with contextlib.suppress(Exception):  # cancelled in this moment
            self.done.set_exception(error)

    def finish(self) -> None:
        """Hand the rows over, if anybody still waits for them."""
        with contextlib.suppress(Exception):
            self.done.set_result(self.rows)


class EmbeddingEngine:
    """An embedding model that serves many requests at once, from one event loop.

    Args:
        model: see `LLM`.
        max_waiting: parts of requests (of up to 256 texts) in the engine; further ones wait outside
            until there is room.
        progress: see `LLM`.
        embedder: one that exists already, instead of `model` and `options`.
        options: see `LLM`.
    """

    def __init__(
        self,
        model: str = "minilm-l6",
        *,
        max_waiting: int = 1024,
        progress: bool = False,
        embedder: Embedder | None = None,
        **options: Any,
    ) -> None:
        if max_waiting < 1:
            raise ValueError(f"{max_waiting=} must be at least 1")
        if embedder is None:
            with bars(progress) as report:
                embedder = Embedder(EngineConfig.from_keywords(model=str(model), **options), report)
        self.embedder = embedder
        self._room = asyncio.Semaphore(max_waiting)
        self._arrived: list[_Part] = []  # in this turn of the event loop, which alone touches it
        self._inbox: queue.SimpleQueue[list[_Part] | None] = queue.SimpleQueue()
        self._encoded: queue.Queue[list[tuple[_Part, list[Encoded]]] | None] = queue.Queue(1)
        self._parts: set[_Part] = set()  # all that are in the engine; under the lock
        self._lock = threading.Lock()
        self._death: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name=name, daemon=True)
            for run, name in (
                (self._tokenize, "arctic-jax-embed-tokenizer"),
                (self._serve, "arctic-jax-embed-device"),
            )
        ]
        for thread in self._threads:
            thread.start()

    async def embed(
        self, texts: str | Sequence[Text], params: EmbeddingParams | None = None
    ) -> np.ndarray:
        """Return a row for each text, in their order, float32 `[texts, dimensions]`.

        Waits while the engine is full. If the caller is cancelled, texts that are in no batch yet
        are forgotten.

        Raises:
            InvalidRequestError: a text or a parameter of this request is out of range.
            EngineDeadError: the engine has failed or was shut down.
        """
        return (await self.embed_counted(texts, params))[0]

    async def embed_counted(
        self, texts: str | Sequence[Text], params: EmbeddingParams | None = None
    ) -> tuple[np.ndarray, int]:
        """Return what `embed` does, and how many tokens the texts have, special ones included."""
        params = params or EmbeddingParams()
        prompt, dimensions = self.embedder.check(params)
        many = [texts] if isinstance(texts, str) else list(texts)
        parts = [
            _Part(many[i : i + PART_TEXTS], prompt, params.truncate, self.embedder.dimension)
            for i in range(0, len(many), PART_TEXTS)
        ]
        if not parts:
            return np.empty((0, dimensions), np.float32), 0
        rows = await self._embed_parts(parts)
        num_tokens = sum(sum(part.lengths.values()) for part in parts)
        return self.embedder.shorten(rows, dimensions), num_tokens

    def fail(self, error: EngineDeadError) -> None:
        """Give the engine up from outside: everybody who waits is told."""
        with self._lock:
            self._death = self._death or error
            parts = list(self._parts)
        for part in parts:
            part.fail(error)

    @property
    def dead(self) -> bool:
        """Whether the engine has failed or was shut down."""
        return self._death is not None

    @property
    def num_waiting(self) -> int:
        """Parts of requests in the engine."""
        return len(self._parts)

    def shutdown(self) -> None:
        """Stop; requests that are not answered end with `EngineDeadError`."""
        self._inbox.put(None)
        for thread in self._threads:
            thread.join()

    async def _embed_parts(self, parts: Sequence[_Part]) -> np.ndarray:
        if len(parts) == 1:  # a task costs a turn of the event loop
            return await self._embed_part(parts[0])
        tasks = [asyncio.ensure_future(self._embed_part(part)) for part in parts]
        try:
            return np.concatenate(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # one part has failed, or the caller was cancelled
                task.cancel()

    async def _embed_part(self, part: _Part) -> np.ndarray:
        async with self._room:
            with self._lock:
                if self._death is not None:
                    raise EngineDeadError(str(self._death)) from self._death
                self._parts.add(part)
            if not self._arrived:
                asyncio.get_running_loop().call_soon(self._hand_over)
            self._arrived.append(part)
            try:
                return await asyncio.wrap_future(part.done)
            finally:
                with self._lock:
                    self._parts.discard(part)

    def _hand_over(self) -> None:
        """Give what arrived in one turn of the event loop to the first thread, together."""
        together, count = [], 0
        for part in self._arrived:
            together.append(part)
            count += len(part.texts)
            if count >= MAX_COLLECTED:
                self._inbox.put(together)
                together, count = [], 0
        if together:
            self._inbox.put(together)
        self._arrived = []

    def _guarded(self, run: Any) -> None:
        """Run a thread's loop; whatever ends it ends the engine."""
        try:
            run()
            error: BaseException = EngineDeadError("the engine was shut down")
        except BaseException as failure:
            logger.exception("the embedding engine has failed")
            error = EngineDeadError(str(failure))
            error.__cause__ = failure
        with self._lock:
            self._death = self._death or error
            parts = list(self._parts)
        for part in parts:
            part.fail(error)
        self._inbox.put(None)  # the other thread ends, too

    def _tokenize(self) -> None:
        """Collect and tokenize: the first thread's whole life."""
        try:
            while (parts := self._collect()) is not None:
                self._tokenize_parts(parts)
        finally:
            self._put_encoded(None)

    def _tokenize_parts(self, parts: Sequence[_Part]) -> None:
        groups: dict[tuple[str, bool], list[_Part]] = {}
        for part in parts:
            if not part.done.cancelled():
                groups.setdefault((part.prompt, part.truncate), []).append(part)
        for (prompt, truncate), members in groups.items():
            texts = [text for part in members for text in part.texts]
            ids = iter(self.embedder.text_encoder.encode(texts, prompt, truncate=truncate))
            self._put_encoded([(p, list(itertools.islice(ids, len(p.texts)))) for p in members])

    def _put_encoded(self, found: list[tuple[_Part, list[Encoded]]] | None) -> None:
        """Wait for room behind this thread, unless nobody takes anything any more."""
        while self._death is None:
            with contextlib.suppress(queue.Full):
                self._encoded.put(found, timeout=0.1)
                return

    def _collect(self) -> list[_Part] | None:
        """Wait for parts and take what else is there; `None` when it is time to stop."""
        arrived = self._inbox.get()
        parts: list[_Part] = []
        while arrived is not None:
            parts += arrived
            if sum(len(part.texts) for part in parts) >= MAX_COLLECTED:
                return parts
            try:
                arrived = self._inbox.get_nowait()
            except queue.Empty:
                return parts
        return None

    def _serve(self) -> None:
        """Launch and collect: the second thread's whole life."""
        desk = _Desk(self.embedder)
        in_flight: collections.deque[tuple[Plan, Array]] = collections.deque()
        while True:
            with contextlib.suppress(queue.Empty):
                found = self._encoded.get(block=not in_flight and not desk.has_work)
                if found is None:
                    return
                for part, encoded in found:
                    desk.admit(part, encoded)
            desk.forget_cancelled()
            # What does not fill a batch goes when there is nothing else to do.
            started = len(in_flight) < MAX_IN_FLIGHT and desk.launch(rest=not in_flight)
            if started:
                in_flight.append(started)
            elif in_flight:
                desk.deliver(*in_flight.popleft())


class _Desk:
    """The texts that wait for a batch or are in one, and whose they are. The device thread's."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._packer = Packer(embedder.runner.ladder)
        self._numbers = itertools.count()
        self._waiting: dict[int, Sequence[int]] = {}
        self._owners: dict[int, tuple[_Part, int]] = {}
        self._open: set[_Part] = set()

    @property
    def has_work(self) -> bool:
        """Whether a text waits for a batch."""
        return bool(self._waiting)

    def admit(self, part: _Part, encoded: list[Encoded]) -> None:
        """Let a part's texts wait for batches; one that is bad fails the part, and no other."""
        good = [ids for ids in encoded if not isinstance(ids, InvalidRequestError)]
        if len(good) < len(encoded):
            i, error = next((i, e) for i, e in enumerate(encoded) if isinstance(e, Exception))
            part.fail(InvalidRequestError(f"text {i}: {error}", "input"))
            return
        for i, (ids, number) in enumerate(zip(good, self._numbers, strict=False)):
            self._waiting[number], self._owners[number] = ids, (part, i)
            part.lengths[number] = len(ids)
            self._packer.add([(number, len(ids))])
        self._open.add(part)

    def forget_cancelled(self) -> None:
        """Take out what nobody waits for any more, as far as it is in no batch yet."""
        for part in [part for part in self._open if part.done.cancelled()]:
            self._open.remove(part)
            for number, length in part.lengths.items():
                if self._waiting.pop(number, None) is not None:
                    self._packer.remove(number, length)
                    del self._owners[number]

    def launch(self, *, rest: bool) -> tuple[Plan, Array] | None:
        """Start a batch if there is a full one; with `rest` any."""
        plan = self._packer.take(rest=rest)
        return None if plan is None else (plan, self._embedder.launch(plan, self._waiting))

    def deliver(self, plan: Plan, vectors: Array) -> None:
        """Wait for a batch and put its rows where they belong."""
        for number, row in zip(plan.lengths, host_copies.finish(vectors), strict=False):
            part, i = self._owners.pop(number)
            part.rows[i] = row
            part.missing -= 1
            if not part.missing:
                self._open.discard(part)
                part.finish()
