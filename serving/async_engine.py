"""`AsyncEngine`: the engine in a thread of its own, for programs that run an event loop.

The thread owns the engine and everything behind it; the event loop talks to it through an inbox of
calls, and it answers through one mailbox a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from arctic_jax.config import DEFAULT_MODEL, EngineConfig
from arctic_jax.engine.output_processor import join_deltas
from arctic_jax.engine.replicas import Engine, make_engine
from arctic_jax.errors import EngineDeadError
from arctic_jax.llm import Prompt, parse_prompt
from arctic_jax.progress import bars
from arctic_jax.request import RequestOutput, RequestOutputKind, SamplingParams
from arctic_jax.serving.structured_outputs import compile_grammar

logger = logging.getLogger(__name__)

_MOST_LETTERS = 64  # in a mailbox, before they are put together


class AsyncEngine:
    """A language model that serves many requests at once.

    Args:
        model: see `LLM`.
        progress: see `LLM`.
        engine: one that exists already, instead of `model` and `options`.
        options: see `LLM`.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        progress: bool = False,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        if engine is None:
            config = EngineConfig.from_keywords(model=str(model), **options)
            with bars(progress) as report:
                engine = make_engine(config, report)
        self.engine = engine
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}  # touched by the engine's thread only
        self._ids = itertools.count()
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="arctic-jax-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the state of a request until it is finished.

        States that a slow reader did not fetch in time are skipped, or with
        `RequestOutputKind.DELTA` put together: no more waits for it than the answers themselves.
        Leaving the iterator early aborts the request.

        Raises:
            InvalidRequestError: the prompt or a parameter is out of range.
            EngineDeadError: the engine has failed or was shut down.
        """
        arrived = time.monotonic()  # not in `add`, which waits for the end of a step
        params = sampling_params or self.engine.default_sampling_params()
        request_id = request_id or f"request-{next(self._ids)}"
        text, ids, salt = await asyncio.to_thread(parse_prompt, prompt, self.engine)
        form = params.structured_outputs
        grammar = None if form is None else await compile_grammar(self.engine.grammars, form)
        mailbox = _Mailbox(asyncio.get_running_loop(), params.output_kind)

        def add() -> None:
            self.engine.add_request(request_id, ids, params, text, priority, salt, grammar, arrived)
            self._mailboxes[request_id] = mailbox

        try:
            await self._call(add)
            while True:
                output = await mailbox.fetch()
                yield output
                if output.finished:
                    return
        finally:
            # Also if the reader was cancelled before the engine's thread saw the request.
            self._post(lambda: self._abort(request_id, mailbox))

    async def abort(self, request_id: str) -> None:
        """End a request now; its iterator yields a last state. Unknown ids are ignored."""
        await self._call(lambda: self._abort(request_id))

    async def check_health(self) -> None:
        """Return if the engine answers.

        Raises:
            EngineDeadError: it has failed or was shut down.
        """
        await self._call(lambda: None)

    @property
    def dead(self) -> bool:
        """Whether the engine has failed or was shut down."""
        return self._death is not None

    def fail(self, error: EngineDeadError) -> None:
        """Give the engine up from outside, its thread being stuck: everybody who waits is told.

        A step that comes back after all finds that nobody waits, and the thread ends.
        """
        self._death = self._death or error
        self._inbox.put(None)
        _put_and_ring([(mailbox, self._death) for mailbox in list(self._mailboxes.values())])
        self._refuse_calls(self._death)

    def shutdown(self, timeout: float | None = None) -> bool:
        """Stop the engine; running requests end with `EngineDeadError`.

        Returns:
            Whether its thread has ended, `timeout` seconds being over.
        """
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    async def _call(self, function: Callable[[], None]) -> None:
        """Run a function in the engine's thread, between two steps."""
        await asyncio.wrap_future(self._post(function))

    def _post(self, function: Callable[[], None]) -> Future[None]:
        call = _Call(function)
        self._inbox.put(call)
        if self._death is not None:  # perhaps nobody looks into the inbox any more
            self._refuse_calls(self._death)
        return call.done

    def _refuse_calls(self, death: BaseException) -> None:
        while True:
            try:
                call = self._inbox.get(block=False)
            except queue.Empty:
                return
            if call is not None:
                call.refuse(death)

    def _abort(self, request_id: str, mailbox: _Mailbox | None = None) -> None:
        if mailbox is not None and self._mailboxes.get(request_id) is not mailbox:
            return  # the request has ended, and its id may be somebody else's by now
        output = self.engine.abort(request_id)
        if output is not None:
            self._deliver([output])

    def _run(self) -> None:
        """Serve until told to stop: the engine thread's whole life."""
        try:
            while True:
                if not self._drain() or self._death is not None:
                    raise EngineDeadError("the engine was shut down")
                self._deliver(self.engine.step())
        except BaseException as error:
            if not isinstance(error, EngineDeadError):
                logger.exception("the engine has failed")
            self._death = self._death or error
            _put_and_ring([(mailbox, error) for mailbox in self._mailboxes.values()])
            self._mailboxes.clear()
            self._refuse_calls(error)

    def _drain(self) -> bool:
        """Do what is in the inbox, waiting for something if the engine is idle; stop on `None`."""
        block = not self.engine.has_requests
        while True:
            try:
                call = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if call is None:
                return False
            call.run()
            block = not self.engine.has_requests

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        letters = []
        for output in outputs:
            take = self._mailboxes.pop if output.finished else self._mailboxes.get
            if (mailbox := take(output.request_id, None)) is not None:
                letters.append((mailbox, output))
        _put_and_ring(letters)


class _Call:
    """A function for the engine's thread, and what became of it."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self.done: Future[None] = Future()

    def run(self) -> None:
        """Call the function, unless nobody waits for it any more."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self._function()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    def refuse(self, death: BaseException) -> None:
        """Say that the engine is dead."""
        if self.done.set_running_or_notify_cancel():
            error = EngineDeadError(str(death))
            error.__cause__ = death
            self.done.set_exception(error)


class _Mailbox:
    """What one request's reader has not fetched yet, from the engine's thread to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kind: RequestOutputKind) -> None:
        self.loop = loop
        self._adds_up = kind is RequestOutputKind.DELTA
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._letters: list[RequestOutput] = []
        self._death: BaseException | None = None

    def put(self, item: RequestOutput | BaseException) -> None:
        """Add a delta, or replace an earlier state; by any thread. `ring` has to follow."""
        with self._lock:
            if isinstance(item, BaseException):
                self._death = item
            elif self._adds_up:
                self._letters.append(item)
                if len(self._letters) > _MOST_LETTERS:
                    self._letters = [join_deltas(self._letters)]
            else:
                self._letters = [item]

    def ring(self) -> None:
        """Wake the reader; called by its loop."""
        self._arrived.set()

    async def fetch(self) -> RequestOutput:
        """Wait for something newer than what was fetched before."""
        while True:
            with self._lock:
                letters, self._letters = self._letters, []
                death = self._death
            if death is not None:
                raise EngineDeadError(str(death)) from death
            if letters:
                return join_deltas(letters)
            await self._arrived.wait()
            self._arrived.clear()


def _put_and_ring(letters: Iterable[tuple[_Mailbox, RequestOutput | BaseException]]) -> None:
    """Put everything into its mailbox, then wake the readers, those of a loop by one call.

    Each such call writes to a socket, which hands the interpreter to the loop: one for each of many
    streams would hold the next step up.
    """
    addressed: dict[asyncio.AbstractEventLoop, list[_Mailbox]] = defaultdict(list)
    for mailbox, letter in letters:
        mailbox.put(letter)
        addressed[mailbox.loop].append(mailbox)
    for loop, mailboxes in addressed.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody reads any more
            loop.call_soon_threadsafe(_ring, mailboxes)


def _ring(mailboxes: Iterable[_Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.ring()
