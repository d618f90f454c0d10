"""Every range of `SamplingParams`, and that messages name the parameter and its value."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from arctic_jax.errors import InvalidRequestError
from arctic_jax.request import MAX_BAD_WORDS, MAX_LOGIT_BIAS, CompletionOutput, SamplingParams

NO_NUMBERS = [math.nan, math.inf, -math.inf, True, "1", None, [1.0], 1e39, 1j]
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)

BAD = [
    ({"n": 0}, "n must be at least 1, got 0."),
    ({"n": -3}, "n must be at least 1, got -3."),
    ({"n": 129}, "n must be at most 128, got 129."),
    ({"n": 10**12}, "n must be at most 128, got 1000000000000."),
    ({"n": 1.0}, "n must be at least 1, got 1.0."),
    ({"n": True}, "n must be at least 1, got True."),
    ({"n": "2"}, "n must be at least 1, got '2'."),
    ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2."),
    ({"temperature": -1}, "temperature must be non-negative, got -1."),
    ({"temperature": -1e-9}, "temperature must be non-negative, got -1e-09."),
    ({"temperature": 2.1}, "temperature must be at most 2, got 2.1."),
    ({"presence_penalty": -2.1}, "presence_penalty must be in [-2, 2], got -2.1."),
    ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], got 2.1."),
    ({"frequency_penalty": -2.1}, "frequency_penalty must be in [-2, 2], got -2.1."),
    ({"frequency_penalty": 2.1}, "frequency_penalty must be in [-2, 2], got 2.1."),
    ({"repetition_penalty": 0}, "repetition_penalty must be greater than zero, got 0."),
    ({"repetition_penalty": -1.0}, "repetition_penalty must be greater than zero, got -1.0."),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0."),
    ({"top_p": 1.01}, "top_p must be in (0, 1], got 1.01."),
    ({"top_p": -0.5}, "top_p must be in (0, 1], got -0.5."),
    ({"top_k": -2}, "top_k must be 0 or -1 (all), or at least 1, got -2."),
    ({"top_k": 1.5}, "top_k must be 0 or -1 (all), or at least 1, got 1.5."),
    ({"top_k": True}, "top_k must be 0 or -1 (all), or at least 1, got True."),
    ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
    ({"min_p": 1.1}, "min_p must be in [0, 1], got 1.1."),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
    ({"max_tokens": 2.0}, "max_tokens must be at least 1, got 2.0."),
    ({"max_tokens": "16"}, "max_tokens must be at least 1, got '16'."),
    ({"max_tokens": True}, "max_tokens must be at least 1, got True."),
    ({"min_tokens": -1}, "min_tokens must be non-negative, got -1."),
    ({"min_tokens": None}, "min_tokens must be non-negative, got None."),
    ({"min_tokens": 17}, "min_tokens must be at most max_tokens=16, got 17."),
    ({"logprobs": -1}, "logprobs must be non-negative, got -1."),
    ({"logprobs": True}, "logprobs must be non-negative, got True."),
    ({"logprobs": 1.0}, "logprobs must be non-negative, got 1.0."),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be non-negative, got -1."),
    ({"seed": 2**63}, f"seed must be a 64-bit integer, got {2**63}."),
    ({"seed": -(2**63) - 1}, f"seed must be a 64-bit integer, got {-(2**63) - 1}."),
    ({"seed": 1.0}, "seed must be a 64-bit integer, got 1.0."),
    ({"seed": True}, "seed must be a 64-bit integer, got True."),
    ({"stop": ""}, "stop must hold non-empty strings, got ''."),
    ({"stop": ["a", ""]}, "stop must hold non-empty strings, got ['a', '']."),
    ({"stop": ["a", 1]}, "stop must hold non-empty strings, got ['a', 1]."),
    ({"stop": 5}, "stop must be a list, got 5."),
    ({"stop": ["a"] * 17}, "stop must hold at most 16 strings, got 17."),
    ({"stop": "a", "detokenize": False}, "stop needs detokenize=True, got 'a'."),
    ({"stop_token_ids": 2}, "stop_token_ids must be a list, got 2."),
    ({"stop_token_ids": "2"}, "stop_token_ids must be a list, got '2'."),
    ({"bad_words": "word"}, "bad_words must be a list, got 'word'."),
    ({"bad_words": [""]}, "bad_words must hold non-empty strings, got ['']."),
    ({"bad_words": [3]}, "bad_words must hold non-empty strings, got [3]."),
    ({"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, "bad_words at most 128 words, got 129."),
    ({"logit_bias": [1, 2]}, "logit_bias must map token ids to numbers, got [1, 2]."),
    ({"logit_bias": {5: 101}}, "logit_bias values must be in [-100, 100], got {5: 101}."),
    ({"logit_bias": {5: -101}}, "logit_bias values must be in [-100, 100], got {5: -101}."),
    ({"logit_bias": {5: math.nan}}, "logit_bias values must be in [-100, 100], got {5: nan}."),
    ({"logit_bias": {5: "1"}}, "logit_bias values must be in [-100, 100], got {5: '1'}."),
    ({"logit_bias": {5: True}}, "logit_bias values must be in [-100, 100], got {5: True}."),
    (
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)},
        "logit_bias at most 1024 entries, got 1025.",
    ),
    ({"allowed_token_ids": []}, "allowed_token_ids must not be empty, got []."),
    ({"allowed_token_ids": 7}, "allowed_token_ids must be a list, got 7."),
    ({"allowed_token_ids": "7"}, "allowed_token_ids must be a list, got '7'."),
]


@pytest.mark.parametrize(("params", "message"), BAD)
def test_values_out_of_range_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**params)
    assert str(caught.value) == message
    assert caught.value.parameter == next(iter(params))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_finite_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value) == f"{name} must be a finite number, got {value!r}."


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(temperature="9" * 100_000)  # pyright: ignore[reportArgumentType]
    assert len(str(caught.value)) < 300


GOOD: list[dict[str, Any]] = [
    {},
    {"n": 128},
    {"temperature": 0},
    {"temperature": 2},
    {"temperature": 5e-324},
    {"top_p": 5e-324},
    {"top_p": 1},
    {"top_k": -1},
    {"top_k": 10**30},
    {"min_p": 0, "presence_penalty": -2, "frequency_penalty": 2},
    {"min_p": 1, "presence_penalty": 2, "frequency_penalty": -2},
    {"repetition_penalty": 1e-30},
    {"max_tokens": None, "min_tokens": 10**9},
    {"max_tokens": 10**30},
    {"max_tokens": 5, "min_tokens": 5},
    {"logprobs": 0, "prompt_logprobs": 0},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"stop": "a"},
    {"stop": ("a", "b")},
    {"stop": [], "bad_words": [], "stop_token_ids": [], "logit_bias": {}},
    {"logit_bias": {1: -100, 2: 100}},
    {"stop_token_ids": {1, 2}, "allowed_token_ids": range(5)},
    {"temperature": np.float32(0.5), "max_tokens": np.int32(3), "seed": np.int64(-1)},
    {"temperature": Fraction(1, 2)},
]


@pytest.mark.parametrize("params", GOOD, ids=str)
def test_values_in_range_are_taken(params: dict[str, Any]) -> None:
    made = SamplingParams(**params)
    for name, value in params.items():
        assert getattr(made, name) == value


def test_the_defaults_and_the_order_are_those_of_vllm() -> None:
    assert SamplingParams() == SamplingParams(1, 0.0, 0.0, 1.0, 1.0, 1.0, 0, 0.0, None, None)
    assert SamplingParams().max_tokens == 16
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams().stop_strings == ()


@pytest.mark.parametrize("token", [-1, 10, 10**30, 1.0, "1", None, True])
@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias", "allowed_token_ids"])
def test_token_ids_must_be_in_the_vocabulary(name: str, token: Any) -> None:
    value: Any = {token: 1.0} if name == "logit_bias" else [0, token]
    params = SamplingParams(**{name: value})
    with pytest.raises(InvalidRequestError) as caught:
        params.check_vocabulary(10)
    assert str(caught.value) == f"{name} is not a token id of a vocabulary of 10, got {token!r}."


def test_token_ids_of_the_vocabulary_are_taken() -> None:
    params = SamplingParams(
        stop_token_ids=[0, 9], logit_bias={0: 1, 9: 1}, allowed_token_ids=[0, int(np.int64(9))]
    )
    params.check_vocabulary(10)


@pytest.mark.parametrize(
    ("params", "adjusts"),
    [
        ({}, False),
        ({"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 1}, False),
        ({"logit_bias": {}, "bad_words": []}, False),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"logit_bias": {1: 0.0}}, True),
        ({"allowed_token_ids": [0]}, True),
        ({"bad_words": ["a"]}, True),
        ({"min_tokens": 1}, True),
    ],
)
def test_what_needs_the_sampler_state(params: dict[str, Any], adjusts: bool) -> None:
    assert SamplingParams(**params).adjusts_logits is adjusts


def test_an_answer_has_ended_when_it_has_a_reason() -> None:
    assert not CompletionOutput(0, "", []).finished()
    assert CompletionOutput(0, "", [], finish_reason="length").finished()
