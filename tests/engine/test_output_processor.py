"""What is new after each step, put together, is everything; and it costs no more than it holds."""

import dataclasses
import itertools
from typing import Any

import pytest
from tiny_engine import make_engine

from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.output_processor import join_deltas
from arctic_jax.request import RequestOutput, RequestOutputKind, SamplingParams

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
BASE = SamplingParams(temperature=1, seed=3, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module", params=["plain", "drafts"])
def engine(request: pytest.FixtureRequest) -> EngineCore:
    options: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 16}
    if request.param == "drafts":
        options["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 4}
    return make_engine(**options)


def outputs_of(
    engine: EngineCore, params: SamplingParams, kind: RequestOutputKind
) -> list[RequestOutput]:
    params = dataclasses.replace(params, output_kind=kind)
    engine.add_request("a", PROMPT, params, prompt="text")
    found = []
    while engine.has_requests:
        found += engine.step()
    return found


def without_times(output: RequestOutput) -> RequestOutput:
    return dataclasses.replace(output, metrics=None, num_cached_tokens=0)


def the_text(engine: EngineCore) -> str:
    (output,) = outputs_of(engine, BASE, RequestOutputKind.FINAL_ONLY)
    return output.outputs[0].text


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"n": 3, "logprobs": 0},
        {"n": 3, "seed": None, "ignore_eos": False, "prompt_logprobs": 0},
        {"detokenize": False, "n": 2},
        {"temperature": 0},
        {"max_tokens": 1, "n": 2},
    ],
)
def test_deltas_add_up(engine: EngineCore, fields: dict[str, Any]) -> None:
    params = dataclasses.replace(BASE, **{"seed": 11} | fields | {"seed": 11})
    engine.reset_prefix_cache()
    deltas = outputs_of(engine, params, RequestOutputKind.DELTA)
    engine.reset_prefix_cache()
    states = outputs_of(engine, params, RequestOutputKind.CUMULATIVE)
    assert without_times(join_deltas(deltas)) == without_times(states[-1])
    # In parts and parts of parts, too, as slow readers get them.
    pairs = [join_deltas(pair) for pair in itertools.batched(deltas, 2)]
    assert without_times(join_deltas(pairs)) == without_times(states[-1])
    assert [output.finished for output in deltas] == [False] * (len(deltas) - 1) + [True]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_deltas_keep_back_what_may_become_a_stop_string(
    engine: EngineCore, length: int, include: bool
) -> None:
    text = the_text(engine)
    for at in range(len(text) // 2, len(text) // 2 + 5):
        stop = text[at : at + length]
        params = dataclasses.replace(
            BASE, stop=[stop, stop + "never"], include_stop_str_in_output=include, n=2
        )
        deltas = outputs_of(engine, params, RequestOutputKind.DELTA)
        (final,) = outputs_of(engine, params, RequestOutputKind.FINAL_ONLY)
        assert without_times(join_deltas(deltas)) == without_times(final)
        first = final.outputs[0]
        assert first.stop_reason == stop
        assert first.text == text[: text.index(stop) + (length if include else 0)]


def test_a_delta_holds_only_what_is_new(engine: EngineCore) -> None:
    """Over a whole answer no token is reported twice, and ended answers not again."""
    params = dataclasses.replace(BASE, n=2, logprobs=1, prompt_logprobs=1, max_tokens=40)
    deltas = outputs_of(engine, params, RequestOutputKind.DELTA)
    assert len(deltas) > 10
    answers = [answer for output in deltas for answer in output.outputs]
    assert sum(len(answer.token_ids) for answer in answers) == 80
    assert sum(len(answer.logprobs or ()) for answer in answers) == 80
    assert max(len(answer.token_ids) for answer in answers) <= 5  # drafts and one more
    assert all(answer.token_ids for answer in answers)
    assert [answer.index for answer in answers if answer.finished()] in ([0, 1], [1, 0])
    assert deltas[0].prompt_logprobs is not None
    assert len(deltas[0].prompt_logprobs) == len(PROMPT)
    assert all(output.prompt_logprobs is None for output in deltas[1:])


def test_an_aborted_request_reports_its_rest(engine: EngineCore) -> None:
    params = dataclasses.replace(BASE, output_kind=RequestOutputKind.DELTA, n=2)
    engine.add_request("a", PROMPT, params)
    deltas = [output for _ in range(6) for output in engine.step()]
    last = engine.abort("a")
    assert last is not None
    assert last.finished
    assert [answer.finish_reason for answer in last.outputs] == ["abort"] * 2
    joined = join_deltas([*deltas, last])
    whole = outputs_of(engine, BASE, RequestOutputKind.FINAL_ONLY)[0].outputs[0].token_ids
    assert joined.outputs[0].token_ids == whole[: len(joined.outputs[0].token_ids)]
    assert joined.outputs[0].token_ids
    while engine.has_requests:
        assert engine.step() == []
