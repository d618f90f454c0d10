"""The real OpenAI client against a server of a real model, and of an embedding model."""

import json
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tiny_encoder
from live_server import CLIENT, LiveServer, serve

from arctic_jax.engine.core import EngineCore
from arctic_jax.request import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams
from arctic_jax.serving import reasoning_parsers, tool_parsers
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.embedding_engine import EmbeddingEngine

MODEL = "smollm2-135m-instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France? One word."}]


def client_of(server: LiveServer) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(**CLIENT)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 32}
    engine = AsyncEngine(MODEL, max_model_len=256, num_blocks=32, **options)
    with serve(engine, names=(MODEL,)) as server, client_of(server) as client:
        yield client
        server.wait_until_idle()
    engine.shutdown()


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.with_raw_response.list().http_response.status_code == 200


def test_completions(client: openai.OpenAI) -> None:
    prompt = "The capital of France is"
    whole = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=8, logprobs=2, echo=True
    )
    (choice,) = whole.choices
    assert choice.text.startswith(f"{prompt} Paris")
    assert len(choice.logprobs.tokens) == 5 + 8
    assert choice.logprobs.tokens[5] == " Paris"
    assert whole.usage.completion_tokens == 8
    stream = client.completions.create(
        model=MODEL,
        prompt=[prompt, "One plus one is"],
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, usage = ["", ""], None
    for chunk in stream:
        usage = chunk.usage
        for part in chunk.choices:
            texts[part.index] += part.text
    assert prompt + texts[0] == choice.text
    assert texts[1]
    assert usage.completion_tokens == 16


def test_chat(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    options["max_completion_tokens"] = 8
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    text = whole.choices[0].message.content
    assert "Paris" in text
    tokens = whole.choices[0].logprobs.content
    assert text.startswith("".join(token.token for token in tokens[:2]))
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    with client.chat.completions.stream(**options) as stream:
        parts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(parts) == final.choices[0].message.content == text
    assert len(parts) > 1


def test_answers_of_all_remaining_context_end(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert answer.choices[0].finish_reason == "stop"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be at most 2") as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="The model `gpt` does not exist"):
        client.chat.completions.create(model="gpt", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        client.completions.create(model=MODEL, prompt=[5] * 300)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path: Path = tiny_encoder.write(tmp_path_factory.mktemp("encoder") / "model")
    engine = EmbeddingEngine(str(path), max_model_len=128, max_num_batched_tokens=256)
    with serve(engine, names=("encoder",)) as server:
        yield server
    engine.shutdown()


def test_embeddings(encoder: LiveServer) -> None:
    texts = ["one", "two and three", "four"]
    with client_of(encoder) as client:
        numbers = client.embeddings.create(model="encoder", input=texts, encoding_format="float")
        packed = client.embeddings.create(model="encoder", input=texts)  # the client asks base64
        assert np.array_equal(
            np.array([row.embedding for row in numbers.data], np.float32),
            np.array([row.embedding for row in packed.data], np.float32),
        )
        assert [row.index for row in numbers.data] == [0, 1, 2]
        for row in numbers.data:
            assert math.isclose(np.linalg.norm(row.embedding), 1, rel_tol=1e-5)
        short = client.embeddings.create(model="encoder", input="one", dimensions=8)
        assert len(short.data[0].embedding) == 8
        tokens = encoder.post("/tokenize", {"prompt": "one"}).json()["tokens"]
        same = client.embeddings.create(model="encoder", input=tokens)
        assert np.allclose(same.data[0].embedding, numbers.data[0].embedding, atol=1e-6)
        assert same.usage.prompt_tokens == same.usage.total_tokens == len(tokens)
        with pytest.raises(openai.BadRequestError, match="dimensions must be 1 to 32, got 33"):
            client.embeddings.create(model="encoder", input="one", dimensions=33)
        with pytest.raises(openai.BadRequestError, match="the model takes 128"):
            client.embeddings.create(model="encoder", input="x" * 600)
        with pytest.raises(openai.BadRequestError, match="embeds texts and generates none"):
            client.completions.create(model="encoder", prompt="x")
    assert encoder.get("/health").status_code == 200
    assert "request_success_total" in encoder.get("/metrics").text


class ScriptedEngine(AsyncEngine):
    """Answers with a text of the test's, three characters a state; only checks are the engine's."""

    script = ""

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        assert sampling_params is not None
        ids = prompt["prompt_token_ids"]
        ends = [*range(3, len(self.script), 3), len(self.script)]
        if sampling_params.output_kind is RequestOutputKind.FINAL_ONLY:
            ends = ends[-1:]
        for number, end in enumerate(ends):
            done = end == len(self.script)
            begin = 3 * number if len(ends) > 1 else 0
            answer = CompletionOutput(0, self.script[begin:end], [65])
            if done:
                answer = replace(answer, finish_reason="stop")
            yield RequestOutput(str(request_id), None, ids, [answer], done)


@pytest.fixture(scope="module")
def scripted(tiny_core: EngineCore) -> Iterator[LiveServer]:
    engine = ScriptedEngine(engine=tiny_core)
    with serve(
        engine,
        tool_parser=tool_parsers.PARSERS["hermes"],
        enable_auto_tool_choice=True,
        reasoning_parser=reasoning_parsers.PARSERS["qwen3"],
    ) as server:
        yield server
    engine.shutdown()


TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def test_tools_and_reasoning(scripted: LiveServer) -> None:
    scripted.engine.script = f"<think>I need a tool.</think>I look.{CALL}\n{CALL}"
    options: Any = {"model": "tiny", "messages": [{"role": "user", "content": "?"}]}
    options["tools"] = TOOLS
    with client_of(scripted) as client:
        choice = client.chat.completions.create(**options).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        assert choice.message.model_extra["reasoning"] == "I need a tool."
        calls = choice.message.tool_calls
        assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Bern"}] * 2
        with client.chat.completions.stream(**options) as stream:
            reasoning = ""
            for event in stream:
                if event.type == "chunk" and event.chunk.choices:
                    extra = event.chunk.choices[0].delta.model_extra or {}
                    reasoning += extra.get("reasoning", "")
            final = stream.get_final_completion().choices[0]
        assert reasoning == "I need a tool."
        assert final.finish_reason == "tool_calls"
        assert final.message.content == "I look."
        names = [call.function.name for call in final.message.tool_calls]
        assert names == ["weather", "weather"]
        # Told not to, or without tools, what looks like a call is text.
        for fields in ({"tool_choice": "none"}, {"tools": openai.omit}):
            choice = client.chat.completions.create(**options | fields).choices[0]
            assert choice.message.tool_calls is None
            assert choice.message.content == f"I look.{CALL}\n{CALL}"
        choice = client.chat.completions.create(**options, tool_choice="required").choices[0]
        assert len(choice.message.tool_calls) == 2


def test_earlier_calls_are_part_of_a_conversation(scripted: LiveServer) -> None:
    scripted.engine.script = "Sunny."
    function = {"name": "weather", "arguments": '{"city": "Bern"}'}
    calls = [{"id": "1", "type": "function", "function": function}]
    messages: Any = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    with client_of(scripted) as client:
        answer = client.chat.completions.create(model="tiny", messages=messages)
    assert answer.choices[0].message.content == "Sunny."
