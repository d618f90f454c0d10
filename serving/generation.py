"""`Generation`: the requests of one call in the engine, from its admission to its end."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

from arctic_jax.request import RequestOutput, RequestOutputKind, SamplingParams
from arctic_jax.serving.error_responses import APIError
from arctic_jax.serving.metrics import Metrics, RequestTimer
from arctic_jax.serving.served_model import EncodedPrompt, ServedModel
from arctic_jax.serving.tracing import current_span


class Generation:
    """Answers to the prompts of one call. Leaving its context aborts what still runs.

    Args:
        model: whose engine works.
        metrics: told of every request.
        prompts: each becomes one request with `params.n` answers.
        params: of all prompts.
        priority: of all prompts.
        cache_salt: of all prompts.

    Raises:
        InvalidRequestError: a prompt or a parameter is out of range; nothing was begun.
        APIError: too much waits already.
        EngineDeadError: the engine has failed.
    """

    def __init__(
        self,
        model: ServedModel,
        metrics: Metrics,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        self.prompts = prompts
        self.params = params
        self.id = uuid.uuid4().hex
        self._engine = model.engine
        self._metrics = metrics
        self._priority = priority
        self._cache_salt = cache_salt
        self._tasks: list[asyncio.Task[None]] = []
        for prompt in prompts:
            self._engine.engine.check_request(prompt.token_ids, params)
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._span = current_span.get()
        if self._span is not None:
            streams = params.output_kind is not RequestOutputKind.FINAL_ONLY
            self._span.asked(self.id, params, streams)
        self._ticket = model.admission.admit(len(prompts) * params.n, num_tokens)

    async def __aenter__(self) -> Generation:
        """Nothing begins before somebody asks for it."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Abort what still runs, and give the places back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ticket.close()

    async def states(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield what is new of all requests as it comes, each with its prompt's number.

        Who reads slowly gets fewer and larger pieces; one piece of each request waits.

        Raises:
            APIError: a request has failed.
            EngineDeadError: the engine has failed or was shut down.
        """
        if len(self.prompts) == 1:
            async for output in self._states_of(0):
                yield 0, output
            return
        arrived: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue(1)

        async def forward(index: int) -> None:
            try:
                async for output in self._states_of(index):
                    await arrived.put((index, output))
            except Exception as error:
                await arrived.put(error)

        self._tasks = [asyncio.create_task(forward(i)) for i in range(len(self.prompts))]
        missing = len(self.prompts)
        while missing:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            missing -= item[1].finished
            yield item

    async def results(self) -> list[RequestOutput]:
        """Return every request's end, with everything if it is `FINAL_ONLY`; see `states`."""
        found: dict[int, RequestOutput] = {}
        async for index, output in self.states():
            if output.finished:
                found[index] = output
        return [found[index] for index in range(len(self.prompts))]

    async def _states_of(self, index: int) -> AsyncIterator[RequestOutput]:
        prompt = self.prompts[index]
        timer = RequestTimer(self._metrics, self.params)
        states = self._engine.generate(
            {"prompt": prompt.text, "prompt_token_ids": prompt.token_ids}
            | ({} if self._cache_salt is None else {"cache_salt": self._cache_salt}),
            self.params,
            f"{self.id}-{index}",
            priority=self._priority,
        )
        async with contextlib.aclosing(states) as states:  # pyright: ignore
            first = True
            async for output in states:
                if first:
                    self._ticket.started(len(prompt.token_ids))
                    first = False
                timer.observe(output)
                if self._span is not None:
                    self._span.observe(output)
                self._check(output)
                yield output

    def _check(self, output: RequestOutput) -> None:
        for answer in output.outputs:
            if answer.error is not None:
                # What a call has forbidden is its own affair.
                status = 400 if self.params.adjusts_logits else 500
                raise APIError(status, answer.error)
