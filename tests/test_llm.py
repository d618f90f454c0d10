"""`LLM` on a checkpoint on disk, as a script uses it, against the plain model."""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import plain_model
import pytest
from tiny_checkpoint import EOS, decode, encode, write_checkpoint
from tiny_engine import CONFIG, make_tensors

from arctic_jax import LLM, RequestOutput, SamplingParams
from arctic_jax.engine.core import EngineCore
from arctic_jax.errors import ChatTemplateError, CheckpointError, InvalidRequestError
from arctic_jax.request import CompletionOutput, Logprob

TENSORS = make_tensors()
SMALL: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 4,
    "num_blocks": 64,
    "progress": False,
}
DEFAULTS = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 5, "eos_token_id": 96}


def core_of(llm: LLM) -> EngineCore:
    assert isinstance(llm.engine, EngineCore)
    return llm.engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), generation_config=DEFAULTS)


@pytest.fixture(scope="module")
def shared_llm(directory: Path) -> LLM:
    return LLM(str(directory), dtype="float32", **SMALL)


@pytest.fixture
def llm(shared_llm: LLM) -> Any:
    """Whatever a test does, it leaves nothing behind."""
    yield shared_llm
    check_nothing_is_left(shared_llm)


def check_nothing_is_left(llm: LLM) -> None:
    core_of(llm).check()
    pool = core_of(llm).scheduler.pool
    assert pool.num_free == pool.num_blocks
    assert not core_of(llm).has_requests
    assert not core_of(llm)._groups
    assert not core_of(llm)._group_of
    assert not llm._unread


def greedy(max_tokens: int = 8, **params: Any) -> SamplingParams:
    """Goes past the end of the sequence unless told otherwise."""
    return SamplingParams(
        **{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **params}
    )


def plain_answer(
    prompt: str,
    max_tokens: int = 8,
    adjust: Callable[[np.ndarray, list[int]], np.ndarray] = lambda logits, output: logits,
) -> list[int]:
    """The plain model's greedy answer, its logits changed by `adjust(logits, output so far)`."""
    output: list[int] = []
    for _ in range(max_tokens):
        logits = plain_model.logits(CONFIG, TENSORS, encode(prompt) + output)[-1]
        output.append(int(adjust(logits, output).argmax()))
    return output


def answers(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def only(outputs: list[RequestOutput]) -> CompletionOutput:
    assert len(outputs) == len(outputs[0].outputs) == 1
    return outputs[0].outputs[0]


def test_every_form_of_a_prompt(llm: LLM) -> None:
    expected = plain_answer("Hello")
    ids = encode("Hello")
    forms: list[Any] = [
        "Hello",
        ids,
        tuple(ids),
        np.array(ids),
        ["Hello"],
        [ids],
        ("Hello",),
        np.array([ids]),
        {"prompt": "Hello"},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "prompt": "Hello"},
        {"prompt": "Hello", "prompt_token_ids": None, "cache_salt": "tenant"},
        [{"prompt": "Hello"}],
        (text for text in ["Hello"]),
    ]
    for form in forms:
        output = only(llm.generate(form, greedy()))
        assert output.token_ids == expected
        assert output.text == decode(expected)
        assert output.finish_reason == "length"
        assert output.finished()


def test_outputs_say_what_was_asked(llm: LLM) -> None:
    outputs = llm.generate(
        ["Hello", encode("ab"), {"prompt": "x", "prompt_token_ids": [7]}], greedy()
    )
    assert [output.prompt for output in outputs] == ["Hello", None, "x"]
    assert [output.prompt_token_ids for output in outputs] == [encode("Hello"), encode("ab"), [7]]
    assert all(output.finished for output in outputs)
    assert len({output.request_id for output in outputs}) == 3
    metrics = outputs[0].metrics
    assert metrics is not None
    times = [
        metrics.arrival_time,
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.last_token_time,
        metrics.finished_time,
    ]
    assert None not in times
    assert times == sorted(times, key=lambda t: t or 0)


def test_many_prompts_come_back_in_their_order(llm: LLM) -> None:
    prompts = [chr(ord("a") + i) * (1 + 5 * i % 17) for i in range(12)]
    lengths = [1 + 7 * i % 10 for i in range(12)]
    outputs = llm.generate(prompts, [greedy(n) for n in lengths])
    assert answers(outputs) == [plain_answer(p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert [output.prompt for output in outputs] == prompts


def test_no_prompts_no_answers(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.chat([]) == []


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate("a", [greedy(), greedy()])
    with pytest.raises(ValueError, match="1 priorities for 2 prompts"):
        llm.generate(["a", "b"], greedy(), priority=[1])


def test_defaults_come_from_the_generation_config(llm: LLM) -> None:
    expected = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=5)
    assert llm.get_default_sampling_params() == expected
    output = only(llm.generate("Hello"))
    assert len(output.token_ids) == 5 or output.token_ids[-1] == EOS


BAD_PROMPTS = [
    ("", "the prompt must not be empty"),
    ([], "the prompt must not be empty"),
    ("§", "token id 97 is not in the vocabulary of 97"),
    ([1, 97], "token id 97 is not in the vocabulary of 97"),
    ([-1], "token id -1 is not in the vocabulary of 97"),
    ([10**30], f"token id {10**30} is not"),
    ("x" * 96, "maximum context length is 96 tokens.* 96 input tokens"),
    ("x" * 5000, "maximum context length is 96 tokens.* 5000 input tokens"),
    ("\ud800", r"the text '\\ud800' cannot be encoded"),
    (None, "a prompt is text, token ids or a mapping of these, got None"),
    (1.5, "a prompt is text, .*, got 1.5"),
    ([1, "a"], r"a prompt is text, .*, got \[1, 'a'\]"),
    ([1.5], r"a prompt is text, .*, got \[1.5\]"),
    ({}, "a prompt is text, .*, got {}"),
    ({"text": "a"}, "a prompt is text, .*, got {'text': 'a'}"),
    ({"prompt_token_ids": ["1"]}, "a prompt is text"),
    ({"prompt": "a", "cache_salt": 5}, "cache_salt must be a non-empty string, got 5"),
    ({"prompt": "a", "cache_salt": ""}, "cache_salt must be a non-empty string, got ''"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(
    llm: LLM, prompt: Any, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(["good", prompt, "good too"], greedy())
    check_nothing_is_left(llm)
    assert only(llm.generate("good", greedy(3))).token_ids == plain_answer("good", 3)


BAD_PARAMS = [
    ({"logprobs": 21}, "logprobs must be at most 20, got 21"),
    ({"prompt_logprobs": 21}, "prompt_logprobs must be at most 20, got 21"),
    ({"stop_token_ids": [97]}, "stop_token_ids is not a token id .* got 97"),
    ({"logit_bias": {97: 1}}, "logit_bias is not a token id .* got 97"),
    ({"allowed_token_ids": [3, 97]}, "allowed_token_ids is not a token id .* got 97"),
    ({"bad_words": ["\ud800"]}, "cannot be encoded"),
]


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS)
def test_bad_parameters_leave_nothing_behind(
    llm: LLM, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(["a", "b"], [greedy(), greedy(**params)])


def test_odd_priorities_are_refused(llm: LLM) -> None:
    for priority in (1.5, "high", None, True):
        with pytest.raises(InvalidRequestError, match="priority must be an integer"):
            llm.generate(["a", "b"], greedy(), priority=[0, priority])  # pyright: ignore


def test_a_cache_salt_may_be_any_text(llm: LLM) -> None:
    for salt in ("\ud800", "é" * 1000):
        only(llm.generate({"prompt": "Hello", "cache_salt": salt}, greedy(2)))


def test_stop_strings(llm: LLM) -> None:
    text = decode(plain_answer("Hello", 20))
    late, early = text[8:11], text[5:9]
    for include in (False, True):
        params = greedy(20, stop=[late, early, "never"], include_stop_str_in_output=include)
        output = only(llm.generate("Hello", params))
        end = text.index(early)
        assert output.text == text[: end + len(early) if include else end]
        assert (output.finish_reason, output.stop_reason) == ("stop", early)
        assert len(output.token_ids) == end + len(early)


def test_stop_token_ids(llm: LLM) -> None:
    ids = plain_answer("Hello", 20)
    first = ids.index(ids[6])
    for include in (False, True):
        params = greedy(20, stop_token_ids=[ids[6]], include_stop_str_in_output=include)
        output = only(llm.generate("Hello", params))
        assert output.token_ids == ids[: first + 1]
        assert output.text == decode(ids[: first + include])
        assert (output.finish_reason, output.stop_reason) == ("stop", ids[6])


def test_the_end_of_a_sequence(llm: LLM) -> None:
    towards_the_end = {EOS: 100.0}
    output = only(llm.generate("Hello", greedy(5, ignore_eos=False, logit_bias=towards_the_end)))
    assert (output.token_ids, output.text) == ([EOS], "")
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    output = only(llm.generate("Hello", greedy(5, logit_bias=towards_the_end)))
    assert (output.token_ids, output.finish_reason) == ([EOS] * 5, "length")
    shown = greedy(2, logit_bias=towards_the_end, skip_special_tokens=False)
    assert only(llm.generate("Hello", shown)).text == "<eos><eos>"


def test_min_tokens(llm: LLM) -> None:
    params = greedy(9, ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=4)
    output = only(llm.generate("Hello", params))
    without_end = lambda logits, _: np.where(np.arange(97) == EOS, -np.inf, logits)
    assert output.token_ids == [*plain_answer("Hello", 4, without_end), EOS]
    assert output.finish_reason == "stop"


def test_min_tokens_holds_for_stop_strings(llm: LLM) -> None:
    text = decode(plain_answer("Hello", 12, lambda x, o: without(x, [EOS] if len(o) < 6 else [])))
    output = only(llm.generate("Hello", greedy(12, stop=list(text[:3]), min_tokens=6)))
    assert len(output.token_ids) >= 6
    assert output.text.startswith(text[:5])


def without(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    logits = logits.copy()
    logits[tokens] = -np.inf
    return logits


def test_allowed_tokens_and_biases(llm: LLM) -> None:
    allowed = [3, 5, 40, 41]
    forbidden = [i for i in range(97) if i not in allowed]
    bias = np.zeros(97)
    bias[5], bias[60] = 1.5, 100
    output = only(
        llm.generate("Hi", greedy(10, allowed_token_ids=allowed, logit_bias={5: 1.5, 60: 100}))
    )
    assert output.token_ids == plain_answer("Hi", 10, lambda x, _: without(x, forbidden) + bias)


def test_bad_words(llm: LLM) -> None:
    text = decode(plain_answer("Hello", 12))
    words = [text[2:4], text[6], "§"]  # the last is not in the model's vocabulary

    def adjust(logits: np.ndarray, output: list[int]) -> np.ndarray:
        banned = [encode(words[1])[0]]
        if output and output[-1] == encode(words[0])[0]:
            banned.append(encode(words[0])[1])
        return without(logits, banned)

    output = only(llm.generate("Hello", greedy(12, bad_words=words)))
    assert output.token_ids == plain_answer("Hello", 12, adjust)
    assert words[0] not in output.text
    assert words[1] not in output.text


@pytest.mark.parametrize("crowd", [0, 1, 2, 3])
def test_penalties(llm: LLM, crowd: int) -> None:
    """Also in steps that are padded: padding must not count as output."""
    prompt = "Hello there"

    def adjust(logits: np.ndarray, output: list[int]) -> np.ndarray:
        counts = np.bincount(output, minlength=97)
        seen = counts + np.bincount(encode(prompt), minlength=97) > 0
        logits = np.where(seen, np.where(logits > 0, logits / 1.2, logits * 1.2), logits)
        return logits - 0.8 * counts - 0.3 * (counts > 0)

    params = greedy(24, frequency_penalty=0.8, presence_penalty=0.3, repetition_penalty=1.2)
    others = [greedy(5 + i, frequency_penalty=1.0) for i in range(crowd)]
    outputs = llm.generate([prompt, *["abc"[:i] + "x" for i in range(crowd)]], [params, *others])
    assert answers(outputs)[0] == plain_answer(prompt, 24, adjust)


def test_parameters_that_allow_no_token_fail_alone(llm: LLM) -> None:
    impossible = greedy(5, allowed_token_ids=[EOS], min_tokens=2)
    outputs = llm.generate(["Hello", "Hello"], [impossible, greedy(5)])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "allow no token" in (outputs[0].outputs[0].error or "")
    assert answers(outputs)[1] == plain_answer("Hello", 5)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 2**40, "temperature": 1.0},
        {"temperature": 1e-45},
        {"repetition_penalty": 1e-45},
        {"repetition_penalty": 3e38},
        {"top_p": 1e-45, "temperature": 1.0},
        {"seed": -(2**63), "temperature": 1.0, "n": 3},
        {"seed": np.int64(2**63 - 1), "temperature": 1.0, "n": 3},
        {"max_tokens": 10**30, "min_tokens": 10**29},
    ],
    ids=str,
)
def test_extreme_values_disturb_nobody(llm: LLM, params: dict[str, Any]) -> None:
    outputs = llm.generate(["extreme", "Hello"], [greedy(**params), greedy(4)])
    assert outputs[0].finished
    assert answers(outputs)[1] == plain_answer("Hello", 4)


def test_seeds_give_the_same_text_alone_and_in_a_crowd(llm: LLM) -> None:
    mine = SamplingParams(temperature=1.0, seed=7, max_tokens=16, top_p=0.9, ignore_eos=True)
    alone = only(llm.generate("Hello", mine)).token_ids
    assert only(llm.generate("Hello", mine)).token_ids == alone
    for place in range(4):
        prompts = ["a", "some other prompt", "and a third", "x" * 60]
        params = [SamplingParams(temperature=1.3, seed=i, max_tokens=9) for i in range(4)]
        prompts.insert(place, "Hello")
        params.insert(place, mine)
        assert answers(llm.generate(prompts, params))[place] == alone
    other = dataclasses.replace(mine, seed=8)
    assert only(llm.generate("Hello", other)).token_ids != alone


def test_without_a_seed_texts_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=16, ignore_eos=True)
    assert len({str(ids) for ids in answers(llm.generate(["Hello"] * 5, params))}) == 5


def test_n_answers(llm: LLM) -> None:
    params = SamplingParams(n=6, temperature=1.0, seed=3, max_tokens=10, ignore_eos=True)
    output = llm.generate("Hello", params)[0]
    assert [one.index for one in output.outputs] == list(range(6))
    for one in output.outputs:
        alone = dataclasses.replace(params, n=1, seed=3 + one.index)
        assert only(llm.generate("Hello", alone)).token_ids == one.token_ids


def test_logprobs(llm: LLM) -> None:
    params = greedy(6, logprobs=3, prompt_logprobs=2, repetition_penalty=1.5)
    output = llm.generate("Hello", params)[0]
    answer = output.outputs[0]
    exact = plain_model.logits(CONFIG, TENSORS, encode("Hello") + answer.token_ids)
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 6
    total = 0.0
    for i, (token, entries) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        row = exact[4 + i]
        assert next(iter(entries)) == token  # the one that was drawn comes first
        assert set(entries) == {token, *np.argsort(-row)[:3].tolist()}
        for other, entry in entries.items():
            assert isinstance(entry, Logprob)
            assert entry.logprob == pytest.approx(row[other], abs=1e-4)
            assert entry.rank == 1 + (row > row[other]).sum()
            assert entry.decoded_token == ("<eos>" if other == EOS else decode([other]))
        total += row[token]
    assert answer.cumulative_logprob == pytest.approx(total, abs=1e-3)

    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 5
    assert output.prompt_logprobs[0] is None
    for i, (token, entries) in enumerate(
        zip(encode("ello"), output.prompt_logprobs[1:], strict=True)
    ):
        assert entries is not None
        assert next(iter(entries)) == token
        assert set(entries) == {token, *np.argsort(-exact[i])[:2].tolist()}
        for other, entry in entries.items():
            assert entry.logprob == pytest.approx(exact[i, other], abs=1e-4)


def test_the_prompt_of_several_answers_is_reported_once(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=2, prompt_logprobs=1)
    core_of(llm).add_request("a", encode("Hello"), params)
    rows = sum(part.num_rows for part in core_of(llm).scheduler.schedule().requests)
    core_of(llm).abort("a")
    assert rows == 5 + 2
    llm.reset_prefix_cache()  # what was scheduled was not computed
    output = llm.generate("Hello", params)[0]
    assert len(output.prompt_logprobs or ()) == 5
    assert [len(one.token_ids) for one in output.outputs] == [2, 2, 2]


def test_logprobs_of_the_drawn_token_only(llm: LLM) -> None:
    output = llm.generate("Hello", greedy(3, logprobs=0, prompt_logprobs=0))[0]
    assert [len(entries) for entries in output.outputs[0].logprobs or ()] == [1, 1, 1]
    assert [len(entries or ()) for entries in output.prompt_logprobs or ()] == [0, 1, 1, 1, 1]


def test_no_logprobs_unless_asked(llm: LLM) -> None:
    output = llm.generate(["Hello", "Hello"], [greedy(3), greedy(3, logprobs=1)])[0]
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_prompt_logprobs_of_a_long_prompt_do_not_use_the_prefix_cache(llm: LLM) -> None:
    prompt = "The quick brown fox jumps over the lazy dog, twice; " + "x" * 20
    llm.generate(prompt, greedy(1))
    output = llm.generate(prompt, greedy(1, prompt_logprobs=0))[0]
    exact = plain_model.logits(CONFIG, TENSORS, encode(prompt))
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    ids = encode(prompt)
    assert len(output.prompt_logprobs or ()) == len(prompt)
    for i, entries in enumerate((output.prompt_logprobs or ())[1:]):
        assert entries is not None
        assert entries[ids[i + 1]].logprob == pytest.approx(exact[i, ids[i + 1]], abs=1e-4)


def test_everything_at_once_is_each_alone(llm: LLM) -> None:
    every: list[SamplingParams] = [
        greedy(7),
        greedy(12, logprobs=2),
        SamplingParams(seed=1, max_tokens=9, min_p=0.1),
        SamplingParams(seed=2, max_tokens=5, top_k=3, prompt_logprobs=1),
        greedy(10, stop=["e", "a"]),
        greedy(10, frequency_penalty=2.0),
        SamplingParams(seed=3, n=3, max_tokens=6, presence_penalty=1.0),
        greedy(8, bad_words=["a", "bc"], min_tokens=3),
        greedy(3, detokenize=False),
        SamplingParams(seed=4, max_tokens=None, temperature=0.3, allowed_token_ids=range(50)),
    ]
    prompts = [f"prompt {i} " + "abcdefgh"[: i % 8] * (i % 3) for i in range(len(every))]

    def essence(output: RequestOutput) -> list[tuple]:
        return [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in output.outputs]

    alone = [essence(llm.generate(p, one)[0]) for p, one in zip(prompts, every, strict=True)]
    assert [essence(output) for output in llm.generate(prompts, every)] == alone
    assert alone[8][0][1] == ""


def test_no_limit_means_the_context_length(llm: LLM) -> None:
    for limit in (None, 1000):
        output = only(llm.generate("x" * 90, greedy(limit)))  # pyright: ignore
        assert (len(output.token_ids), output.finish_reason) == (6, "length")


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    prompt = "s:Be brief\nu:Hi\na:"
    expected = plain_answer(prompt)
    assert only(llm.chat(conversation, greedy())).token_ids == expected
    many = llm.chat([conversation, conversation[1:]], greedy())
    assert answers(many) == [expected, plain_answer("u:Hi\na:")]
    assert many[0].prompt_token_ids == encode(prompt)
    other = llm.chat(conversation, greedy(), chat_template="{{ messages[0].content }}")
    assert other[0].prompt_token_ids == encode("Be brief")
    with pytest.raises(ChatTemplateError):
        llm.chat(conversation, greedy(), chat_template="{{ 1 // 0 }}")


def test_streaming(llm: LLM) -> None:
    outputs = list(llm.stream("Hello", greedy(6)))
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 7))
    assert [output.finished for output in outputs] == [False] * 5 + [True]
    texts = [output.outputs[0].text for output in outputs]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert texts[-1] == decode(plain_answer("Hello", 6))


def test_leaving_a_stream_early_aborts_it(llm: LLM) -> None:
    stream = llm.stream("Hello", greedy(50))
    next(stream)
    stream.close()
    check_nothing_is_left(llm)


def test_streams_may_be_interleaved(llm: LLM) -> None:
    one, two = llm.stream("Hello", greedy(6)), llm.stream("there", greedy(9))
    last: dict[str, list[int]] = {}
    for a, b in zip(one, two, strict=False):
        last = {"one": a.outputs[0].token_ids, "two": b.outputs[0].token_ids}
        assert only(llm.generate("x", greedy(2))).token_ids == plain_answer("x", 2)
    two.close()
    assert last["one"] == plain_answer("Hello", 6)
    assert last["two"] == plain_answer("there", 9)[: len(last["two"])]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_interrupt_leaves_the_engine_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, steps: int, before: bool
) -> None:
    """Also in the moment when the old cache is given away and the new one not yet here."""
    programs = core_of(llm).runner.programs
    run, count = programs.run, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if before and count == steps + 1:
            os.kill(os.getpid(), signal.SIGINT)
        results = run(*arguments)
        if not before and count == steps + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return results

    prompts = [f"prompt number {i} {steps} {before}" for i in range(6)]
    with monkeypatch.context() as patch:
        patch.setattr(programs, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, greedy(20))
    check_nothing_is_left(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert answers(llm.generate(prompts, greedy(4))) == [plain_answer(p, 4) for p in prompts]


def test_an_interrupt_while_prompts_are_queued(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add, count = core_of(llm).scheduler.add, 0

    def interrupted(request: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGINT)
        add(request)

    with monkeypatch.context() as patch:
        patch.setattr(core_of(llm).scheduler, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Hello"] * 4, SamplingParams(n=2))


def test_a_step_that_fails_leaves_no_empty_blocks_to_be_found(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError("no memory")

    prompts = ["a prompt of a step that fails", "another such prompt"]
    with monkeypatch.context() as patch:
        patch.setattr(core_of(llm).runner.programs, "run", fail)
        with pytest.raises(MemoryError):
            llm.generate(prompts, greedy())
    check_nothing_is_left(llm)
    outputs = llm.generate(prompts, greedy())
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    assert answers(outputs) == [plain_answer(prompt) for prompt in prompts]


def test_prefixes_are_cached_until_reset(llm: LLM) -> None:
    prompt = "nobody else has this as a prompt...."
    cached = [llm.generate(prompt, greedy(1))[0].num_cached_tokens for _ in range(2)]
    llm.reset_prefix_cache()
    cached.append(llm.generate(prompt, greedy(1))[0].num_cached_tokens)
    assert cached == [0, 32, 0]


def test_embeddings_are_refused(llm: LLM, directory: Path) -> None:
    for ask in (llm.embed, llm.encode):
        with pytest.raises(ValueError, match=f"{directory} is not an embedding model"):
            ask(["Hello"], use_tqdm=False)


def test_the_tokenizer_is_that_of_transformers(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer("Hello")["input_ids"] == encode("Hello")
    assert tokenizer.eos_token_id == EOS


def test_progress_is_shown_on_standard_error(
    llm: LLM, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "_progress", True)
    llm.generate("Hello", greedy(2), use_tqdm=False)
    assert capfd.readouterr() == ("", "")
    llm.generate("Hello", greedy(2))
    shown = capfd.readouterr()
    assert "Generating" in shown.err
    assert shown.out == ""


def test_dummy_weights_need_a_config_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    small = SMALL | {"max_num_seqs": 1}
    llm = LLM(str(tmp_path), load_format="dummy", **small)
    output = only(llm.generate("<5> <6>", greedy(4)))
    assert len(output.token_ids) == 4
    with pytest.raises(CheckpointError):
        LLM(str(tmp_path), **small)


def test_more_positions_than_the_model_has_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len=97 is more than the model's 96 positions"):
        LLM(str(directory), max_model_len=97, **SMALL)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
    write_checkpoint(tmp_path, CONFIG | {"rope_scaling": yarn})
    with pytest.raises(ValueError, match="max_model_len=193 is more than the model's 192 pos"):
        LLM(str(tmp_path), max_model_len=193, **SMALL)


def test_a_smaller_context_is_kept(directory: Path) -> None:
    llm = LLM(str(directory), max_model_len=20, **(SMALL | {"max_num_seqs": 1}))
    assert len(only(llm.generate("x" * 15, greedy(None))).token_ids) == 5  # pyright: ignore
    with pytest.raises(InvalidRequestError, match="maximum context length is 20 tokens"):
        llm.generate("x" * 20, greedy(1))


def test_bfloat16_runs(directory: Path) -> None:
    llm = LLM(str(directory), dtype="bfloat16", **(SMALL | {"max_num_seqs": 2}))
    output = llm.generate(["Hello", "Hello there"], greedy(4, logprobs=0))[0].outputs[0]
    exact = plain_model.logits(CONFIG, TENSORS, encode("Hello"))[-1]
    exact = exact - np.log(np.exp(exact).sum())
    first = (output.logprobs or [])[0][output.token_ids[0]]
    assert first.logprob == pytest.approx(exact[output.token_ids[0]], abs=0.1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about CPUs")
@pytest.mark.parametrize(("dtype", "fewest"), [("bfloat16", 2), ("float32", 1)])
def test_no_step_of_a_cpu_has_one_row_in_16_bits(directory: Path, dtype: str, fewest: int) -> None:
    """There XLA takes ten times as long for it as for two."""
    llm = LLM(str(directory), dtype=dtype, **(SMALL | {"max_num_seqs": 1}))
    engine: Any = llm.engine
    buckets = [bucket for _, bucket in engine.runner.picker.steps]
    assert min(bucket.num_tokens for bucket in buckets) == fewest
    assert min(bucket.num_rows for bucket in buckets) == fewest
    assert len(only(llm.generate("Hello", greedy(5))).token_ids) == 5  # pyright: ignore
