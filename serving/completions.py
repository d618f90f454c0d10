"""`/v1/completions`: prompts in, texts out, whole or as they grow."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from arctic_jax.request import (
    CompletionOutput,
    PositionLogprobs,
    RequestOutput,
    RequestOutputKind,
)
from arctic_jax.serving.error_responses import APIError
from arctic_jax.serving.generation import Generation
from arctic_jax.serving.logprobs import CompletionLogprobsWriter, prompt_logprobs
from arctic_jax.serving.metrics import Metrics
from arctic_jax.serving.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from arctic_jax.serving.served_model import ServedModel
from arctic_jax.serving.structured_outputs import structured_outputs
from arctic_jax.serving.usage import UsageCounter


class CompletionCall:
    """One call: what was asked, and how it is answered.

    Args:
        model: that answers.
        request: what was asked.
        generation: its requests in the engine.
    """

    def __init__(
        self, model: ServedModel, request: CompletionRequest, generation: Generation
    ) -> None:
        self.generation = generation
        self._model = model
        self._request = request
        self._id = f"cmpl-{generation.id}"
        as_ids = request.return_tokens_as_token_ids
        self._as_token_ids = model.options.return_tokens_as_token_ids if as_ids is None else as_ids
        self._prompt_logprobs: dict[int, list[PositionLogprobs | None]] = {}
        # Nothing is to be generated, but the engine makes no less than a token.
        self._generates = request.max_tokens != 0

    @classmethod
    async def begin(
        cls, model: ServedModel, metrics: Metrics, request: CompletionRequest
    ) -> CompletionCall:
        """Check a call and let it in.

        Raises:
            APIError, InvalidRequestError, EngineDeadError: see `Generation`.
        """
        model.check(request, len(request.prompt))
        if request.suffix:
            raise APIError(400, "suffix is not supported.", "suffix")
        if request.best_of not in (None, request.n or 1):
            raise APIError(400, f"best_of is not supported, got {request.best_of}.", "best_of")
        if request.logprobs is not None and request.logprobs < 0:
            raise APIError(
                400, f"logprobs must be non-negative, got {request.logprobs}.", "logprobs"
            )
        wanted = request.prompt_logprobs
        if request.echo and wanted is None:
            wanted = request.logprobs
        max_tokens = 1 if request.echo and request.max_tokens == 0 else request.max_tokens
        form = await structured_outputs(request, model.engine.engine.grammars)
        params = model.sampling_params(
            request,
            max_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=wanted,
            structured_outputs=form,
            output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
        )
        prompts = await model.encode(
            request.prompt,
            add_special_tokens=request.add_special_tokens,
            truncate=request.truncate_prompt_tokens,
        )
        generation = Generation(
            model, metrics, prompts, params, request.priority, request.cache_salt
        )
        return cls(model, request, generation)

    async def response(self) -> CompletionResponse:
        """Wait for all answers."""
        outputs = await self.generation.results()
        usage = UsageCounter(self._model.options.enable_prompt_tokens_details)
        choices = []
        for index, output in enumerate(outputs):
            usage.take(index, output, self._generates)
            self._keep_prompt_logprobs(index, output)
            for answer in output.outputs:
                piece = _Piece(self, index, answer.index)
                choices.append(piece.choice(output, answer))
                if self._request.prompt_logprobs is not None:
                    choices[-1].prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return CompletionResponse(
            id=self._id, model=self._model.name, choices=choices, usage=usage.total
        )

    async def events(self) -> AsyncIterator[str]:
        """Yield the JSON of each chunk."""
        options = self._request.stream_options
        force = self._model.options.enable_force_include_usage
        at_end = force or (options is not None and options.include_usage)
        always = force or (options is not None and options.continuous_usage_stats)
        usage = UsageCounter(self._model.options.enable_prompt_tokens_details)
        pieces: dict[tuple[int, int], _Piece] = {}
        chunk = CompletionResponse(
            id=self._id,
            object="text_completion",
            created=int(time.time()),
            model=self._model.name,
            choices=[],
        )
        async for index, output in self.generation.states():
            usage.take(index, output, self._generates)
            self._keep_prompt_logprobs(index, output)
            for answer in output.outputs:
                key = (index, answer.index)
                piece = pieces.setdefault(key, _Piece(self, *key))
                chunk.choices = [piece.choice(output, answer)]
                if always:
                    chunk.usage = usage.total
                yield chunk.model_dump_json(exclude_unset=True)
        if at_end:
            chunk.choices, chunk.usage = [], usage.total
            yield chunk.model_dump_json(exclude_unset=True)

    def _keep_prompt_logprobs(self, index: int, output: RequestOutput) -> None:
        """Keep what a stream's first output has for all answers to a prompt."""
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[index] = output.prompt_logprobs


class _Piece:
    """One answer, on its way piece by piece."""

    def __init__(self, call: CompletionCall, prompt: int, answer: int) -> None:
        self._call = call
        self._number = prompt
        self._index = prompt * call.generation.params.n + answer
        self._prompt = call.generation.prompts[prompt]
        spell = lambda token: self._decode([token])
        self._writer = CompletionLogprobsWriter(call._as_token_ids, spell)
        self._begun = False

    def choice(self, output: RequestOutput, answer: CompletionOutput) -> CompletionChoice:
        """Make the choice of a delta, or of a whole answer."""
        request, call = self._call._request, self._call
        text, token_ids = answer.text, answer.token_ids
        logprobs = None
        if request.logprobs is not None:
            logprobs = CompletionLogprobs.empty()
            if request.echo and not self._begun:
                logprobs = self._echoed(output.prompt_token_ids, request.logprobs)
            if call._generates and answer.logprobs is not None:
                further = self._writer.write(token_ids, answer.logprobs, request.logprobs)
                for name in CompletionLogprobs.model_fields:
                    getattr(logprobs, name).extend(getattr(further, name))
        if not call._generates:
            text, token_ids = "", []
        if request.echo and not self._begun:
            text = self._prompt_text() + text
        choice = CompletionChoice(
            index=self._index,
            text=text,
            logprobs=logprobs,
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        if not call._generates and answer.finished():  # whatever the token was that nobody sees
            choice.finish_reason, choice.stop_reason = "length", None
        if request.return_token_ids:
            choice.token_ids = token_ids
            if not self._begun:
                choice.prompt_token_ids = output.prompt_token_ids
        self._begun = True
        return choice

    def _echoed(self, token_ids: list[int], most: int) -> CompletionLogprobs:
        positions = self._call._prompt_logprobs.get(self._number)
        if positions is None:
            return CompletionLogprobs.empty()
        return self._writer.write(token_ids, positions, most)

    def _prompt_text(self) -> str:
        if self._prompt.text is not None:
            return self._prompt.text
        return self._decode(self._prompt.token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self._call._model.tokenizer.decode(token_ids, skip_special_tokens=False)
