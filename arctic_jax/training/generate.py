"""Text to train on: a model's own answers to prompts, by the engine. Host only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arctic_jax.llm import LLM, Prompt
from arctic_jax.request import SamplingParams

PROMPT_KEYS = ("messages", "prompt", "question", "text")
WRITTEN_TOGETHER = 2048
"""Conversations that are answered, and then written, before the next begin."""


def read_prompts(paths: Sequence[Path]) -> Iterator[list[dict[str, str]]]:
    """Yield a conversation for each line of JSON: up to the answer that is wanted.

    A line is `{"messages": [...]}`, a text under "prompt", "question" or "text", or `{"turns":
    [...]}`, whose first one is taken; other keys are ignored.

    Raises:
        ValueError: a line has none of these; the message has its number.
    """
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _conversation(json.loads(line), f"{path}:{number}")


def _conversation(line: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    if line.get("messages"):
        messages = [dict(message) for message in line["messages"]]
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    text = next((line[key] for key in PROMPT_KEYS if isinstance(line.get(key), str)), None)
    if line.get("turns"):
        text = line["turns"][0]
    if text is None:
        raise ValueError(f"{where}: none of {', '.join(PROMPT_KEYS)} or turns")
    return [{"role": "user", "content": text}]


def invent_prompts(llm: LLM, count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Let a model write prompts, as what a user would say next (Magpie: Xu et al. 2024).

    It goes on after that part of its chat template which comes before a user's words. What does not
    end within 256 tokens is left out, and so are repetitions.

    Args:
        llm: the model; it has a chat template.
        count: attempts; there are fewer prompts.
        seed: of the sampling.
    """
    tokenizer, words = llm.get_tokenizer(), "THE USER'S WORDS"
    asked = [{"role": "user", "content": words}]
    before = tokenizer.apply_chat_template(asked, tokenize=False).partition(words)[0]
    prompt: Prompt = {"prompt_token_ids": tokenizer.encode(before, add_special_tokens=False)}
    seeds = np.random.default_rng(seed).integers(2**31, size=count).tolist()
    params = [SamplingParams(temperature=1.0, top_p=0.95, max_tokens=256, seed=s) for s in seeds]
    outputs = llm.generate([prompt] * count, params)
    answers = (output.outputs[0] for output in outputs)
    ended = (answer.text.strip() for answer in answers if answer.finish_reason == "stop")
    return [[{"role": "user", "content": text}] for text in dict.fromkeys(ended) if text]


def generate(
    llm: LLM,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    params: SamplingParams,
    out: Path,
    held_back: Path | None = None,
    every: int = 50,
) -> tuple[int, int]:
    """Let a model answer, and write the conversations with their answers as JSON lines.

    What was written is there if the rest is interrupted.

    Args:
        llm: the model.
        conversations: each ends where an answer is wanted; those too long for the model are left
            out.
        params: how it answers; with n > 1 there are n lines to a conversation.
        out: the file for training.
        held_back: the file for the answers to every so-manieth conversation, for evaluation.
        every: how many that are.

    Returns:
        Lines written, and tokens generated.
    """
    asked = that_fit(llm, conversations, params.max_tokens or 1)
    paths = {True: held_back or out, False: out}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    lines = tokens = 0
    for begin in range(0, len(asked), WRITTEN_TOGETHER):
        some = asked[begin : begin + WRITTEN_TOGETHER]
        for i, (messages, output) in enumerate(
            zip(some, llm.chat(some, params), strict=True), begin
        ):
            with paths[i % every == every - 1].open("a", encoding="utf-8") as file:
                for answer in output.outputs:
                    whole = [*messages, {"role": "assistant", "content": answer.text}]
                    file.write(json.dumps({"messages": whole}, ensure_ascii=False) + "\n")
                    lines, tokens = lines + 1, tokens + len(answer.token_ids)
    return lines, tokens


def that_fit(
    llm: LLM, conversations: Sequence[Sequence[Mapping[str, str]]], max_tokens: int
) -> list[Sequence[Mapping[str, str]]]:
    """Leave out conversations that have no room for an answer of so many tokens."""
    longest = llm.engine.runner.max_model_len  # pyright: ignore[reportAttributeAccessIssue]
    template = llm.engine.tokenizer.apply_chat_template
    return [
        messages for messages in conversations if len(template(messages)) < longest - max_tokens
    ]
