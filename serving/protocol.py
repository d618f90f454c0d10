"""What the endpoint is asked and what it answers: OpenAI's JSON with vLLM's additions.

Requests say what they hold and nothing more: ranges are checked by `SamplingParams`, which knows
them for every way into the engine. Fields that are not known are ignored, fields that are known and
not implemented are refused (`UNSUPPORTED`), as is anything that would change the answer unseen.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

Prompts = list[str] | list[list[int]]


def _one_or_many_prompts(value: Any) -> Prompts:
    """Read a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if _all_of(value, int) and value:
            return [value]
        if value and (
            _all_of(value, str) or all(isinstance(p, list) and _all_of(p, int) for p in value)
        ):
            return value
    raise PydanticCustomError("prompt", "must be text, token ids, or a list of either")


def _all_of(values: list[Any], kind: type) -> bool:
    return set(map(type, values)) <= {kind}


def _as_list(text: Any) -> Any:
    return [text] if isinstance(text, str) else text


OneOrManyPrompts = Annotated[
    Prompts,
    PlainValidator(_one_or_many_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
# A long list of mistakes is as good as its first: nobody reads ten million of them.
Integers = Annotated[list[int], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True), BeforeValidator(_as_list)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]

UNSUPPORTED = {
    "use_beam_search": "beam search",
    "prompt_embeds": "prompts as embeddings",
    "logits_processors": "custom logits processors",
    "kv_transfer_params": "KV transfer",
    "audio": "audio",
}
"""Fields that would change the answer if they were ignored, and what they ask for."""


class StreamOptions(BaseModel):
    """Whether usage is streamed: once at the end, or with every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(BaseModel):
    """What completions and chat completions share; `None` is the model's own default."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = None
    stop: Strings | None = None
    user: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    bad_words: Strings | None = None
    allowed_token_ids: Integers | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: int = 0
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: OneOrManyPrompts
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool = True


class ChatCompletionRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: Objects
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: Objects | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    documents: Objects | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False


class EmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`."""

    model: str | None = None
    input: OneOrManyPrompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    user: str | None = None


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    tools: Objects | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Integers


class TokenizeResponse(BaseModel):
    """Answer to `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """Answer to `/detokenize`."""

    prompt: str


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a call."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities as the completions endpoint has them: parallel lists, an entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]

    @staticmethod
    def empty() -> CompletionLogprobs:
        """Make lists to be filled."""
        return CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])


class CompletionChoice(BaseModel):
    """An answer, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class TopLogprob(BaseModel):
    """One token that could have come, as chat completions have it."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """The token that came, and others that could have."""

    top_logprobs: list[TopLogprob] = Field(default_factory=list)


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob] | None = None


class FunctionCall(BaseModel):
    """A function that the model wants called, its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool; `index` counts them in a stream."""

    id: str = Field(default_factory=lambda: f"chatcmpl-tool-{uuid.uuid4().hex}")
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(BaseModel):
    """What the assistant says; `tool_calls` is left out if there are none."""

    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None
    annotations: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    function_call: FunctionCall | None = None
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=lambda calls: calls is None)
    reasoning: str | None = None


class ChatDelta(BaseModel):
    """What is new of a message; fields that are not set are left out."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = "stop"
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunkChoice(BaseModel):
    """What is new of an answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


def _now() -> int:
    return int(time.time())


class CompletionResponse(BaseModel):
    """Answer to `/v1/completions`; also, with less in it, a chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[CompletionChoice]
    service_tier: str | None = None
    system_fingerprint: str | None = None
    usage: Usage | None = None


class ChatCompletionResponse(BaseModel):
    """Answer to `/v1/chat/completions`."""

    id: str
    object: str = "chat.completion"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[ChatChoice]
    service_tier: str | None = None
    system_fingerprint: str | None = None
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """A chunk of a chat completion's stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class Embedding(BaseModel):
    """A vector, or its float32 bytes in base64."""

    index: int
    object: str = "embedding"
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """Answer to `/v1/embeddings`."""

    id: str
    object: str = "list"
    created: int = Field(default_factory=_now)
    model: str
    data: list[Embedding]
    usage: Usage


class ModelCard(BaseModel):
    """A name of the model that is served."""

    id: str
    object: str = "model"
    created: int = Field(default_factory=_now)
    owned_by: str = "arctic-jax"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[dict[str, Any]] = Field(default_factory=list)


class ModelList(BaseModel):
    """Answer to `/v1/models`."""

    object: str = "list"
    data: list[ModelCard]
