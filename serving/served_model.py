"""`ServedModel`: what every route needs: the engine, its names and limits, prompts as tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arctic_jax.errors import EngineDeadError, InvalidRequestError
from arctic_jax.request import SamplingParams
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.embedding_engine import EmbeddingEngine
from arctic_jax.serving.error_responses import APIError
from arctic_jax.serving.limits import Admission, Limits
from arctic_jax.serving.protocol import UNSUPPORTED, EmbeddingRequest, SamplingFields
from arctic_jax.serving.reasoning_parsers import ReasoningParser
from arctic_jax.serving.tool_parsers import ToolParser

# Both sides of a sampling parameter have the same name, but for these.
_SAMPLING = (
    "n",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "bad_words",
    "allowed_token_ids",
    "prompt_logprobs",
)


@dataclass(frozen=True)
class ServedOptions:
    """How a model is served.

    Attributes:
        names: under which it is asked for; the first one is in the answers.
        limits: of calls.
        tool_parser: finds calls of tools in answers; `None` to leave them as text.
        enable_auto_tool_choice: whether the model may decide to call a tool.
        reasoning_parser: takes reasoning out of answers; `None` to leave it in them.
        chat_template: instead of the model's own.
        trust_request_chat_template: whether a call may bring a template of its own.
        response_role: of the messages that are answered.
        use_generation_config: whether the model's `generation_config.json` has the defaults.
        override_generation_config: defaults that go before those.
        return_tokens_as_token_ids: log-probabilities name tokens as `token_id:N`.
        enable_prompt_tokens_details: usage says how many tokens were cached.
        enable_force_include_usage: streams have usage in every chunk.
    """

    names: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    tool_parser: type[ToolParser] | None = None
    enable_auto_tool_choice: bool = False
    reasoning_parser: type[ReasoningParser] | None = None
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    response_role: str = "assistant"
    use_generation_config: bool = True
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    return_tokens_as_token_ids: bool = False
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's tokens, and its text if it came as text."""

    token_ids: list[int]
    text: str | None = None


class ServedModel:
    """A model that generates, or one that embeds, behind the routes.

    Args:
        engine: it belongs to whoever made it.
        options: see there.
    """

    def __init__(self, engine: AsyncEngine | EmbeddingEngine, options: ServedOptions) -> None:
        self.options = options
        self.created = int(time.time())
        self.draining = False
        self._engine = engine
        if isinstance(engine, AsyncEngine):
            core = engine.engine
            self.tokenizer, self.max_model_len = core.tokenizer, core.max_model_len
            default = SamplingParams()
            if options.use_generation_config:
                default = core.default_sampling_params()
            self.default_sampling = dataclasses.replace(
                default, **options.override_generation_config
            )
            core.grammars.prepare()
            slots = sum(c.scheduler.limits.max_num_seqs for c in core.cores)
            self.admission = Admission(options.limits, slots, self._queued_tokens)
        else:
            embedder = engine.embedder
            self.tokenizer, self.max_model_len = embedder.tokenizer, embedder.runner.max_length
            self.admission = Admission(options.limits, 0)

    @property
    def name(self) -> str:
        """The name that answers have."""
        return self.options.names[0]

    @property
    def generates(self) -> bool:
        """Whether it generates text; else it embeds."""
        return isinstance(self._engine, AsyncEngine)

    @property
    def engine(self) -> AsyncEngine:
        """What generates.

        Raises:
            APIError: the model embeds.
        """
        if not isinstance(self._engine, AsyncEngine):
            raise APIError(
                400, f"The model `{self.name}` embeds texts and generates none.", "model"
            )
        return self._engine

    @property
    def embedding_engine(self) -> EmbeddingEngine:
        """What embeds.

        Raises:
            APIError: the model generates.
        """
        if not isinstance(self._engine, EmbeddingEngine):
            raise APIError(400, f"The model `{self.name}` does not support embeddings.", "model")
        return self._engine

    def _queued_tokens(self) -> int:
        waiting = [
            request for c in self.engine.engine.cores for request in list(c.scheduler.waiting)
        ]
        return sum(request.num_prompt_tokens for request in waiting)

    @property
    def healthy(self) -> bool:
        """Whether new calls are served."""
        return not self._engine.dead and not self.draining

    def fail(self, why: str) -> None:
        """Give the engine up: everybody who waits is told why."""
        self._engine.fail(EngineDeadError(why))

    def check_model(self, name: str | None) -> None:
        """Check the model that a call asks for; none at all is right, too.

        Raises:
            APIError: 404, it is not served here; 503, the server is on its way out.
        """
        if self.draining:
            raise APIError(503, "The server is shutting down.", retry_after=1)
        if name and name not in self.options.names:
            aliases = ", ".join(self.options.names)
            message = f"The model `{name[:200]}` does not exist. Valid aliases: {aliases}."
            raise APIError(404, message, "model")

    def check(self, request: SamplingFields, num_prompts: int) -> None:
        """Check what is checked before any work is done.

        Raises:
            APIError: the call asks for too much, or for what there is not.
            EngineDeadError: the engine has failed.
        """
        self.check_model(request.model)
        if self.engine.dead:
            raise EngineDeadError("it has failed or was shut down")
        limits = self.options.limits
        limits.check("prompt", num_prompts, limits.max_prompts)
        limits.check("n", request.n or 1, limits.max_n)
        limits.check("stop", len(request.stop or ()), limits.max_stop_strings)
        if request.stream_options is not None and not request.stream:
            message = "stream_options can only be used with stream=true."
            raise APIError(400, message, "stream_options")
        if request.stream and request.prompt_logprobs is not None:
            message = "prompt_logprobs cannot be used with stream=true."
            raise APIError(400, message, "prompt_logprobs")
        for name, what in UNSUPPORTED.items():
            if (request.model_extra or {}).get(name) not in (None, False):
                raise APIError(400, f"{name}: {what} is not supported yet.", name)

    def sampling_params(
        self, request: SamplingFields, max_tokens: int | None, **given: Any
    ) -> SamplingParams:
        """Combine what a call says, what the model says, and OpenAI's defaults, in this order.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        default = self.default_sampling
        values = {
            name: value for name in _SAMPLING if (value := getattr(request, name)) is not None
        }
        if request.logit_bias is not None:
            values["logit_bias"] = _with_integer_keys(request.logit_bias)
        if max_tokens is not None and max_tokens > self.max_model_len:
            raise InvalidRequestError(
                f"max_tokens={max_tokens} cannot be greater than max_model_len="
                f"{self.max_model_len}. Please request fewer output tokens.",
                "max_tokens",
            )
        values |= {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(default, max_tokens=max_tokens, **values)

    async def encode(
        self,
        prompts: Sequence[str | list[int]],
        *,
        add_special_tokens: bool = True,
        truncate: int | None = None,
    ) -> list[EncodedPrompt]:
        """Turn prompts into tokens, outside of the event loop.

        Args:
            prompts: texts or tokens.
            add_special_tokens: such as the one that begins a text.
            truncate: keep so many of the last tokens; -1 for as many as the model takes.

        Raises:
            InvalidRequestError: one is too long, or no text.
        """
        if truncate is not None and not -1 <= truncate <= self.max_model_len:
            raise InvalidRequestError(
                f"truncate_prompt_tokens must be -1 to {self.max_model_len}, got {truncate}",
                "truncate_prompt_tokens",
            )
        last = self.max_model_len - 1 if truncate == -1 else truncate
        longest = self.tokenizer.max_characters_per_token
        most = None if longest is None else longest * self.max_model_len

        def encode_one(prompt: str | list[int]) -> EncodedPrompt:
            if isinstance(prompt, list):
                return EncodedPrompt(prompt if last is None else prompt[len(prompt) - last :])
            if most is not None and len(prompt) > most and last is None:
                raise InvalidRequestError(
                    f"This model's maximum context length is {self.max_model_len} tokens. However, "
                    f"your prompt contains {len(prompt)} characters (more than {most} characters, "
                    f"which is the upper bound for {self.max_model_len} input tokens). Please "
                    "reduce the length of the input prompt.",
                    "input_text",
                )
            ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            return EncodedPrompt(ids if last is None else ids[len(ids) - last :], prompt)

        if all(isinstance(prompt, list) for prompt in prompts):
            return [encode_one(prompt) for prompt in prompts]
        return await asyncio.to_thread(lambda: [encode_one(prompt) for prompt in prompts])

    def check_embedding(self, request: EmbeddingRequest) -> None:
        """Check what is checked before any text is embedded.

        Raises:
            APIError: the call asks for too much.
        """
        self.check_model(request.model)
        limits = self.options.limits
        limits.check("input", len(request.input), limits.max_prompts)


def _with_integer_keys(logit_bias: Mapping[str, Any]) -> dict[int, Any]:
    try:
        return {int(token): bias for token, bias in logit_bias.items()}
    except ValueError as error:
        raise InvalidRequestError(
            f"logit_bias must map token ids to numbers: {error}", "logit_bias"
        ) from error
