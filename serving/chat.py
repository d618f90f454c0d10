"""`/v1/chat/completions`: a conversation in, the next message out, whole or as it grows."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from arctic_jax.request import CompletionOutput, RequestOutputKind
from arctic_jax.serving.chat_prompt import check_tools, must_call, render
from arctic_jax.serving.error_responses import APIError
from arctic_jax.serving.generation import Generation
from arctic_jax.serving.logprobs import chat_logprobs, prompt_logprobs
from arctic_jax.serving.metrics import Metrics
from arctic_jax.serving.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ToolCall,
)
from arctic_jax.serving.served_model import ServedModel
from arctic_jax.serving.structured_outputs import structured_outputs
from arctic_jax.serving.usage import UsageCounter


class ChatCall:
    """One call: what was asked, and how it is answered.

    Args:
        model: that answers.
        request: what was asked.
        generation: its request in the engine, with `n` answers.
        prompt: the conversation as text.
        uses_tools: whether answers may call tools.
    """

    def __init__(
        self,
        model: ServedModel,
        request: ChatCompletionRequest,
        generation: Generation,
        prompt: str,
        uses_tools: bool,
    ) -> None:
        self.generation = generation
        self._model = model
        self._request = request
        self._prompt = prompt
        self._uses_tools = uses_tools
        self._id = f"chatcmpl-{generation.id}"
        as_ids = request.return_tokens_as_token_ids
        self._as_token_ids = model.options.return_tokens_as_token_ids if as_ids is None else as_ids

    @classmethod
    async def begin(
        cls, model: ServedModel, metrics: Metrics, request: ChatCompletionRequest
    ) -> ChatCall:
        """Check a call and let it in.

        Raises:
            APIError, InvalidRequestError, EngineDeadError: see `Generation`.
        """
        model.check(request, 1)
        uses_tools = check_tools(request, model.options)
        if request.top_logprobs and not request.logprobs:
            raise APIError(400, "top_logprobs needs logprobs=true.", "top_logprobs")
        if (request.top_logprobs or 0) < 0:
            message = f"top_logprobs must be non-negative, got {request.top_logprobs}."
            raise APIError(400, message, "top_logprobs")
        given = request.max_completion_tokens
        form = await structured_outputs(
            request,
            model.engine.engine.grammars,
            model.options.tool_parser if must_call(request) else None,
        )
        params = model.sampling_params(
            request,
            request.max_tokens if given is None else given,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            structured_outputs=form,
            output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
        )
        prompt = await render(model, request, with_tools=uses_tools)
        encoded = await model.encode(
            [prompt],
            add_special_tokens=request.add_special_tokens,  # a template writes its own
            truncate=request.truncate_prompt_tokens,
        )
        generation = Generation(
            model, metrics, encoded, params, request.priority, request.cache_salt
        )
        return cls(model, request, generation, prompt, uses_tools)

    async def response(self) -> ChatCompletionResponse:
        """Wait for all answers."""
        (output,) = await self.generation.results()
        usage = UsageCounter(self._model.options.enable_prompt_tokens_details)
        usage.take(0, output)
        choices = [self._choice(answer) for answer in output.outputs]
        return ChatCompletionResponse(
            id=self._id,
            model=self._model.name,
            choices=choices,
            usage=usage.total,
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
            prompt_token_ids=output.prompt_token_ids if self._request.return_token_ids else None,
        )

    async def events(self) -> AsyncIterator[str]:
        """Yield the JSON of each chunk."""
        options = self._request.stream_options
        force = self._model.options.enable_force_include_usage
        at_end = force or (options is not None and options.include_usage)
        always = force or (options is not None and options.continuous_usage_stats)
        usage = UsageCounter(self._model.options.enable_prompt_tokens_details)
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=int(time.time()),
            model=self._model.name,
            choices=[],
        )
        pieces = [_Piece(self) for _ in range(self.generation.params.n)]
        async for _, output in self.generation.states():
            usage.take(0, output)
            for answer in output.outputs:
                for choice in pieces[answer.index].choices(answer):
                    chunk.choices = [choice]
                    if always:
                        chunk.usage = usage.total
                    yield chunk.model_dump_json(exclude_unset=True)
        if at_end:
            chunk.choices, chunk.usage = [], usage.total
            yield chunk.model_dump_json(exclude_unset=True)

    def _choice(self, answer: CompletionOutput) -> ChatChoice:
        splitter = _Splitter(self)
        reasoning, content, calls = splitter.push(answer.text, finished=True)
        message = ChatMessage(
            role=self._model.options.response_role,
            content=content if content or not (calls or reasoning) else None,
            tool_calls=calls or None,
            reasoning=(reasoning or None) if self._request.include_reasoning else None,
        )
        for call in calls:
            call.index = None
        return ChatChoice(
            index=answer.index,
            message=message,
            logprobs=self._logprobs(answer),
            finish_reason="tool_calls" if calls else answer.finish_reason,
            stop_reason=answer.stop_reason,
            token_ids=answer.token_ids if self._request.return_token_ids else None,
        )

    def _logprobs(self, answer: CompletionOutput) -> ChatLogprobs | None:
        if not self._request.logprobs or answer.logprobs is None:
            return None
        most = self._request.top_logprobs or 0
        return chat_logprobs(answer.token_ids, answer.logprobs, most, self._as_token_ids)


class _Splitter:
    """Splits the text of one answer into reasoning, content and calls of tools."""

    def __init__(self, call: ChatCall) -> None:
        options = call._model.options
        # An answer that has a form is that form from its beginning.
        free = call.generation.params.structured_outputs is None
        kind = options.reasoning_parser if free else None
        self._reasoning = None if kind is None else kind(call._prompt)
        tools = options.tool_parser if call._uses_tools else None
        self._tools = None if tools is None else tools()

    @property
    def num_calls(self) -> int:
        """Calls of tools so far."""
        return 0 if self._tools is None else self._tools.num_calls

    def push(self, text: str, *, finished: bool) -> tuple[str, str, list[ToolCall]]:
        """Take text; return what is new and certain of reasoning, content and calls."""
        reasoning, content, calls = "", text, []
        if self._reasoning is not None:
            reasoning, content = self._reasoning.push(text)
            if finished:
                last_reasoning, last_content = self._reasoning.finish()
                reasoning, content = reasoning + last_reasoning, content + last_content
        if self._tools is not None:
            content, calls = self._tools.push(content)
            if finished:
                last_content, last_calls = self._tools.finish()
                content, calls = content + last_content, calls + last_calls
        return reasoning, content, calls


class _Piece:
    """One answer, on its way piece by piece."""

    def __init__(self, call: ChatCall) -> None:
        self._call = call
        self._splitter = _Splitter(call)
        self._begun = False
        self._token_ids: list[int] = []  # of text that the parsers hold back

    def choices(self, answer: CompletionOutput) -> list[ChatChunkChoice]:
        """Make the choices of a delta, the role before anything else."""
        call, request = self._call, self._call._request
        found = []
        if not self._begun:
            self._begun = True
            role = ChatDelta(role=call._model.options.response_role, content="")
            found.append(
                ChatChunkChoice(index=answer.index, delta=role, logprobs=None, finish_reason=None)
            )
        reasoning, content, calls = self._splitter.push(answer.text, finished=answer.finished())
        if request.return_token_ids:
            self._token_ids += answer.token_ids
        delta = ChatDelta()
        if reasoning and request.include_reasoning:
            delta.reasoning = reasoning
        if content:
            delta.content = content
        if calls:
            delta.tool_calls = calls
        if delta.model_fields_set or answer.finished() or request.logprobs:
            choice = ChatChunkChoice(
                index=answer.index,
                delta=delta,
                logprobs=call._logprobs(answer),
                finish_reason=answer.finish_reason,
            )
            if answer.finished():
                choice.stop_reason = answer.stop_reason
                if self._splitter.num_calls:
                    choice.finish_reason = "tool_calls"
            if request.return_token_ids:
                choice.token_ids, self._token_ids = self._token_ids, []
            found.append(choice)
        return found
