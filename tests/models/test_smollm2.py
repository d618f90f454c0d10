"""The real default model against `transformers`, through the whole engine.

The goldens were computed from the packaged weights, so these are used whatever the hub has.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from arctic_jax import LLM, SamplingParams
from arctic_jax.errors import ModelNotFoundError
from arctic_jax.loading.hub import PACKAGED_MODEL, resolve_model

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPTS = json.loads((GOLDENS / "smollm2_prompts.json").read_text())
GREEDY = dict(np.load(GOLDENS / "smollm2_greedy.npz"))


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(resolve_model(PACKAGED_MODEL))
    except ModelNotFoundError as error:
        pytest.skip(f"the packaged model cannot be had here: {error}")


@pytest.fixture(autouse=True)
def optimized() -> Iterator[None]:
    """Programs that compute for long: here XLA's optimizations cost less than they gain."""
    usual = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", usual)


def make_llm(model: str, **options: object) -> LLM:
    return LLM(model, progress=False, max_num_seqs=16, max_model_len=1024, **options)


def test_float32_is_equal_token_for_token(model: str) -> None:
    llm = make_llm(model, max_num_batched_tokens=256)  # fewer programs; the longest come in parts
    prompts = [p["token_ids"] for p in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert len(outputs) == 32
    for output, expected in zip(outputs, GREEDY["token_ids"], strict=True):
        assert output.outputs[0].token_ids == expected.tolist()


def test_prompts_are_tokenized_like_transformers_does(model: str) -> None:
    from arctic_jax.loading.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    for prompt in PROMPTS:
        if "text" in prompt:
            assert tokenizer.encode(prompt["text"]) == prompt["token_ids"]
        else:
            assert tokenizer.apply_chat_template(prompt["messages"]) == prompt["token_ids"]


@pytest.mark.slow
def test_bfloat16_stays_close(model: str) -> None:
    """Where the two first differ, each one's token is among the other's five likeliest."""
    llm = make_llm(model, dtype="bfloat16", max_num_batched_tokens=256)
    shortest = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]["token_ids"]))[:8]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=5)
    prompts = [PROMPTS[i]["token_ids"] for i in shortest]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for i, output in zip(shortest, outputs, strict=True):
        ours = output.outputs[0]
        for step, token in enumerate(ours.token_ids):
            expected = int(GREEDY["token_ids"][i, step])
            if token != expected:
                assert token in GREEDY["top_ids"][i, step]
                assert expected in ours.logprobs[step]
                break
            theirs = GREEDY["top_logprobs"][i, step, 0]
            assert ours.logprobs[step][token].logprob == pytest.approx(theirs, abs=0.2)
