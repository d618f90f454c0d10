"""From a conversation to the text that the model continues."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from arctic_jax.serving.error_responses import APIError
from arctic_jax.serving.protocol import ChatCompletionRequest, TokenizeRequest
from arctic_jax.serving.served_model import ServedModel, ServedOptions

# What a call says in fields of its own, or what is the model's; not to be slipped in as variables.
_RESERVED = {
    "self",
    "template",
    "chat_template",
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
}


def check_tools(request: ChatCompletionRequest, options: ServedOptions) -> bool:
    """Return whether answers may call tools.

    Raises:
        APIError: the choice of tools is not one that can be kept.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice in (None, "none"):
            return False
        raise APIError(400, "When using `tool_choice`, `tools` must be set.", "tool_choice")
    for tool in request.tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            message = f"tools must hold functions with a name, got {str(tool)[:200]}"
            raise APIError(400, message, "tools")
    if choice == "none":
        return False
    if must_call(request):
        if options.tool_parser is None:
            message = "a tool_choice that must be kept requires --tool-call-parser to be set"
            raise APIError(400, message, "tool_choice")
        return True
    if not options.enable_auto_tool_choice or options.tool_parser is None:
        raise APIError(
            400,
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be '
            "set",
            "tool_choice",
        )
    return True


def must_call(request: ChatCompletionRequest) -> bool:
    """Whether the answer has to be calls: of some tool, or of one that is named."""
    return bool(request.tools) and request.tool_choice not in (None, "none", "auto")


async def render(
    model: ServedModel, request: ChatCompletionRequest | TokenizeRequest, *, with_tools: bool
) -> str:
    """Write a conversation as text, outside of the event loop.

    Raises:
        APIError: a message is none.
        ChatTemplateError: the template refuses it, or takes too long.
    """
    variables = dict(request.chat_template_kwargs or {})
    reserved = _RESERVED | set(model.tokenizer.hf.special_tokens_map)
    for name in variables:
        if name in reserved:
            message = f"chat_template_kwargs must not hold {name!r:.100}."
            raise APIError(400, message, "chat_template_kwargs")
    template = model.options.chat_template
    if isinstance(request, ChatCompletionRequest):
        if request.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", request.reasoning_effort)
        if request.documents is not None:
            variables["documents"] = request.documents
        if request.chat_template is not None:
            if not model.options.trust_request_chat_template:
                message = "chat_template is not accepted without --trust-request-chat-template."
                raise APIError(400, message, "chat_template")
            template = request.chat_template
    if not request.messages:
        raise APIError(400, "messages must not be empty.", "messages")
    messages = [_message(message, i) for i, message in enumerate(request.messages)]
    return await asyncio.to_thread(
        model.tokenizer.render_chat_template,
        messages,
        request.add_generation_prompt,
        chat_template=template,
        tools=request.tools if with_tools else None,
        continue_final_message=request.continue_final_message,
        **variables,
    )


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Make of a message what templates expect: text as one string, arguments as objects."""
    where = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise APIError(400, f"{where} must have a role.", "messages")
    content = message.get("content")
    if not isinstance(content, str | list | None):
        kind = type(content).__name__
        raise APIError(400, f"{where}.content must be text or parts, got {kind}.", "messages")
    plain = dict(message)
    if isinstance(content, list):
        plain["content"] = "\n".join(_text(part, where) for part in content)
    elif content is None:
        plain["content"] = ""
    calls = message.get("tool_calls")
    if calls is not None:
        plain["tool_calls"] = _calls(calls, where)
    return plain


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            return part["text"]
        message = f"{where}.content: a part of type {str(kind)[:100]!r} is not supported."
        raise APIError(400, message, "messages")
    raise APIError(400, f"{where}.content must hold parts of text.", "messages")


def _calls(calls: Any, where: str) -> Sequence[Any]:
    """Parse the arguments of earlier calls: templates write them as objects."""
    if not isinstance(calls, list):
        raise APIError(400, f"{where}.tool_calls must be a list.", "messages")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise APIError(400, f"{where}.tool_calls must hold functions.", "messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                message = f"{where}.tool_calls: arguments are not JSON: {error}"
                raise APIError(400, message, "messages") from error
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found
