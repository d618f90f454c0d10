"""Grammars in the engine: what is answered is what was asked for, whatever else goes on."""

import dataclasses
import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_cases import (
    ARRIVALS,
    SCHEDULES,
    TREE_CONFIG,
    Replay,
    ReplayTree,
    assert_equal,
    generate,
    replay,
)
from tiny_engine import GREEDY, options_of, run

from arctic_jax import EngineConfig, SamplingParams, StructuredOutputsParams
from arctic_jax.engine import replicas
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.grammar_matcher import Matcher
from arctic_jax.errors import InvalidRequestError
from arctic_jax.request import CompletionOutput
from arctic_jax.structured_outputs import StructuredOutputsConfig
from arctic_jax.testing import TINY_EOS_TOKEN_ID, write_model

EOS = TINY_EOS_TOKEN_ID
PROMPT = list(b"What is it?")
GREEDY_40 = dataclasses.replace(GREEDY, max_tokens=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, a byte a token."""
    return write_model(tmp_path_factory.mktemp("tiny"))


def make_engine(model: Path, **options: Any) -> EngineCore:
    """Requests preempt each other all the time, and prompts come in chunks of a few tokens."""
    options = {
        "model": str(model),
        "max_model_len": 96,
        "num_blocks": 26,
        "max_num_batched_tokens": 12,
        "max_num_mixed_tokens": 5,
        "speculative_config": {
            "method": "suffix",
            "num_speculative_tokens": TREE_CONFIG.max_draft_len,
            "suffix_use_tree_spec": True,
        },
    } | options
    return EngineCore(EngineConfig.from_keywords(**options_of(**options)))


@pytest.fixture(scope="module")
def engine(model: Path) -> EngineCore:
    return make_engine(model)


@pytest.fixture(scope="module")
def two_layouts(model: Path) -> EngineCore:
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices")
    return make_engine(
        model,
        tensor_parallel_size=2,
        ulysses_sequence_parallel_size=2,
        shift_parallel_threshold=2,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        speculative_config=None,
    )


def structured(max_tokens: int = 40, params: dict[str, Any] | None = None, **form: Any) -> Any:
    """Greedy, unless `params` say otherwise."""
    form = {"structured_outputs": StructuredOutputsParams(**form)}
    return dataclasses.replace(GREEDY, max_tokens=max_tokens, **form, **(params or {}))


def answer(engine: EngineCore, params: SamplingParams) -> CompletionOutput:
    return generate(engine, [(PROMPT, params)])[0]


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4)
REGEXES = st.recursive(
    st.sampled_from(["a", "b", "[c-f]", "[^x]", "é", "[0-9]{2}", r"\."]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})")
        | inner.map(lambda one: f"({one}){{0,2}}")
    ),
    max_leaves=5,
)
SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -9, "maximum": 120},
            {"type": "string", "maxLength": 3},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"enum": ["x", 1, None]},
            {"const": {"a": [1]}},
        ]
    ),
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2).map(
            lambda found: {
                "type": "object",
                "properties": found,
                "required": sorted(found)[:1],
                "additionalProperties": False,
            }
        )
        | inner.map(lambda one: {"type": "array", "items": one, "maxItems": 2})
        | st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some})
    ),
    max_leaves=4,
)
FORMS = (
    st.lists(TEXTS, min_size=1, max_size=4).map(lambda texts: {"choice": texts})
    | REGEXES.map(lambda regex: {"regex": regex})
    | st.builds(
        lambda schema, compact: {"json": schema, "disable_any_whitespace": compact},
        SCHEMAS,
        st.booleans(),
    )
    | st.just({"grammar": 'root ::= "(" root ")" | "x"'})
)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1.5]),
        "top_k": st.integers(1, 20),
        "top_p": st.floats(0.3, 1.0),
        "seed": st.integers(0, 1000),
        "repetition_penalty": st.floats(0.6, 1.6),
        "frequency_penalty": st.floats(-1, 2),
        "logprobs": st.integers(0, 3),
        "min_tokens": st.integers(0, 4),
        "logit_bias": st.dictionaries(
            st.sampled_from([EOS, 34, 97, 125]), st.floats(-9, 9), max_size=2
        ),
    },
)
REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 30).map(lambda size: (PROMPT * 3)[:size]),
        st.builds(lambda size, form, rest: (size, form, rest), st.integers(4, 30), FORMS, PARAMS),
    )
    | st.tuples(st.just(PROMPT), st.integers(1, 12)),
    min_size=1,
    max_size=6,
)


def follows(form: dict[str, Any], text: str) -> bool:
    """Whether a text has a form, by other means than the engine's."""
    if "choice" in form:
        return text in form["choice"]
    if "regex" in form:
        return re.fullmatch(form["regex"], text) is not None
    if "grammar" in form:
        return re.fullmatch(r"(\(*)x(\)*)", text) is not None and text == text[::-1].translate(
            str.maketrans("()", ")(")
        )
    value = json.loads(text)
    jsonschema.validate(value, form["json"])
    compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return not form["disable_any_whitespace"] or len(text) >= len(compact)


def check_any_schedule(
    engine: EngineCore,
    requests: list,
    arrivals: list[int],
    rate: float | None,
    seed: int,
    kind: type[Replay] = Replay,
) -> None:
    asked = []
    for prompt, what in requests:
        if isinstance(what, int):
            asked.append((prompt, dataclasses.replace(GREEDY, max_tokens=what)))
            continue
        size, form, rest = what
        asked.append((prompt, structured(size, {"seed": 0} | rest, **form)))
    plain = generate(engine, asked, arrivals=arrivals)
    for (_, what), found in zip(requests, plain, strict=True):
        if isinstance(what, int) or found.finish_reason == "length":
            assert len(found.token_ids) == (what if isinstance(what, int) else what[0]) or (
                found.finish_reason == "stop"
            )
            continue
        assert found.finish_reason == "stop", found
        assert follows(what[1], found.text), found
    if rate is None:
        return
    drafted = generate(engine, asked, replay(plain, rate, seed, kind), arrivals)
    for actual, wanted in zip(drafted, plain, strict=True):
        assert_equal(actual, wanted)


RATES = st.sampled_from([0.5, 0.9, 1.0])


@settings(SCHEDULES, max_examples=25)
@given(REQUESTS, ARRIVALS, RATES, st.integers(0, 99), st.sampled_from([Replay, ReplayTree]))
def test_any_schedule(
    engine: EngineCore,
    requests: list,
    arrivals: list[int],
    rate: float,
    seed: int,
    kind: type[Replay],
) -> None:
    check_any_schedule(engine, requests, arrivals, rate, seed, kind)


@pytest.mark.slow  # the programs of four devices take long to compile
@settings(SCHEDULES, max_examples=5)
@given(REQUESTS, ARRIVALS)
def test_any_schedule_in_both_layouts(
    two_layouts: EngineCore, requests: list, arrivals: list[int]
) -> None:
    check_any_schedule(two_layouts, requests, arrivals, None, 0)


def test_an_answer_ends_when_nothing_may_follow(engine: EngineCore) -> None:
    found = answer(engine, structured(regex="abc"))
    assert (found.text, found.finish_reason, found.stop_reason) == ("abc", "stop", None)
    assert found.token_ids == list(b"abc")
    # Also before `min_tokens`: there is no other way to go on.
    found = answer(engine, structured(regex="abc", params={"min_tokens": 9}))
    assert (found.text, found.finish_reason) == ("abc", "stop")


def test_an_end_within_a_draft_leaves_nothing_to_draw(engine: EngineCore) -> None:
    # After the draft's last token the grammar allows the end alone, and min_tokens forbids it.
    asked = [(PROMPT, structured(9, {"min_tokens": 8}, regex="abc"))]
    plain = generate(engine, asked)
    assert (plain[0].text, plain[0].finish_reason) == ("abc", "stop")
    assert_equal(generate(engine, asked, replay(plain, 1.0))[0], plain[0])


def test_an_answer_may_end_only_where_the_grammar_does(engine: EngineCore) -> None:
    eager = {"logit_bias": {EOS: 100}}
    found = answer(engine, structured(regex="[ab]{3,9}", params=eager))
    assert re.fullmatch("[ab]{3}", found.text)
    assert found.token_ids[3:] == [EOS]
    found = answer(engine, structured(regex="[ab]{3,9}", params=eager | {"min_tokens": 6}))
    assert re.fullmatch("[ab]{6}", found.text)
    found = answer(engine, structured(4, regex="[ab]{9}", params=eager))
    assert (len(found.text), found.finish_reason) == (4, "length")


def test_stop_strings_and_forbidden_tokens(engine: EngineCore) -> None:
    found = answer(engine, structured(regex="[ab]{3}STOP[ab]", params={"stop": "STOP"}))
    assert re.fullmatch("[ab]{3}", found.text)
    assert found.stop_reason == "STOP"
    found = answer(engine, structured(regex="[ab]{3}", params={"allowed_token_ids": [97]}))
    assert found.text == "aaa"
    found = answer(engine, structured(regex="b", params={"allowed_token_ids": [97]}))
    assert found.finish_reason == "error"
    assert "allow no token" in found.error


def test_logprobs_are_the_models_own(engine: EngineCore) -> None:
    free = answer(engine, dataclasses.replace(GREEDY, max_tokens=1, logprobs=3))
    bound = answer(engine, structured(regex="~", params={"logprobs": 3}))
    assert [e for t, e in bound.logprobs[0].items() if t != 126][:3] == [
        e for t, e in free.logprobs[0].items() if t != 126
    ][:3]
    assert bound.logprobs[0][126].rank > 1


def test_each_of_n_answers_follows_its_own_course(engine: EngineCore) -> None:
    params = structured(9, regex="[a-z]{2,6}!", params={"n": 4, "temperature": 1.5, "seed": 1})
    engine.add_request("n", PROMPT, params)
    texts = [one.text for one in run(engine)["n"].outputs]
    assert all(re.fullmatch("[a-z]{2,6}!", text) for text in texts)
    assert len(set(texts)) > 1


def test_nothing_is_compiled_for_a_grammar(engine: EngineCore) -> None:
    found = []
    count = lambda event, duration, **_: found.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for regex in ("[ab]{5}", "(c|d){7}"):
            generate(engine, [(PROMPT, structured(regex=regex))] * 4)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not [event for event in found if "backend_compile" in event]


def test_replicas_share_grammars(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "EngineCore", lambda *_, **__: engine)
    many = replicas.ReplicatedEngine(engine.config, files=engine.files)
    for i in range(3):
        many.add_request(str(i), PROMPT, structured(regex="(ab){3}"))
    assert many.grammars is engine.grammars
    assert {output.outputs[0].text for output in run(many).values()} == {"ababab"}


NAMED_IN_TURN = "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(5000)), 'r5000: "a"'])
TOO_COMPLEX = "start: " + "a? " * 6000 + '\na: "x"~0..99'
BAD = [
    ({"json": "{"}, "json", "is not valid"),
    ({"json": "[1]"}, "json", "must be a JSON schema"),
    ({"json": {"type": "nonsense"}}, "json", "nonsense"),
    ({"json": {"$ref": "http://localhost/secret"}}, "json", "localhost"),
    ({"json": {"type": "string", "pattern": "(?=a)"}}, "json", "look"),
    ({"json": {"a": object()}}, "json", "is not valid"),
    ({"json": {"enum": ["x" * 70_000]}}, "json", "at most 65536 characters"),
    ({"regex": "(a"}, "regex", "unclosed group"),
    ({"regex": r"[^\x00-\x{10ffff}]"}, "regex", "matches no text"),
    ({"regex": "\ud800"}, "regex", "is not valid"),
    ({"grammar": "start: nowhere"}, "grammar", "nowhere"),
    ({"grammar": "root ::= ("}, "grammar", "is not valid"),
    (
        {"grammar": "start: " + "a? " * 6000 + '\na: "x"~0..99'},
        "grammar",
        "too complex|too big|more than",
    ),
]


@pytest.mark.parametrize(("form", "name", "message"), BAD)
def test_bad_grammars_are_refused(
    engine: EngineCore, form: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine.add_request("bad", PROMPT, structured(**form))
    assert caught.value.parameter == f"structured_outputs.{name}"
    assert not engine.has_requests


def test_forms_are_checked_without_a_model() -> None:
    for form in ({}, {"regex": "a", "choice": ["a"]}, {"json_object": False}):
        with pytest.raises(InvalidRequestError, match="exactly one of json, regex"):
            StructuredOutputsParams(**form)
    for form in ({"choice": []}, {"choice": [""]}, {"choice": "a"}, {"regex": 1}, {"json": 1}):
        with pytest.raises(InvalidRequestError, match=f"structured_outputs.{next(iter(form))}"):
            StructuredOutputsParams(**form)
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        structured(regex="a", params={"ignore_eos": True})
    with pytest.raises(ValueError, match="max_schema_depth must be a positive number, got 0"):
        EngineConfig.from_keywords(max_schema_depth=0)


def test_bounds(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"properties": {"a": deep}}
    with pytest.raises(InvalidRequestError, match="nested at most 32 deep"):
        engine.grammars.compile(StructuredOutputsParams(json=deep))
    text = '{"items":' * 100_000 + "{}" + "}" * 100_000
    bounds = StructuredOutputsConfig(max_grammar_size=2 << 20, grammar_time_limit=1e-9)
    monkeypatch.setattr(engine.grammars, "config", bounds)
    with pytest.raises(InvalidRequestError, match=r"structured_outputs.json is not valid"):
        engine.grammars.compile(StructuredOutputsParams(json=text))
    choice = StructuredOutputsParams(choice=[f"{i}" * 3 for i in range(5000)])
    with pytest.raises(InvalidRequestError, match="takes more than 1e-09 seconds") as caught:
        engine.grammars.compile(choice)
    assert caught.value.parameter == "structured_outputs.choice"
    # It goes on, and who comes again finds it.
    engine.grammars.submit(choice).result()
    assert engine.grammars.compile(choice).matcher().allowed_prefix(list(b"111x")) == 3


def test_rules_may_nest_as_deep_as_they_fit(engine: EngineCore) -> None:
    assert len(NAMED_IN_TURN) > 60_000
    assert answer(engine, structured(grammar=NAMED_IN_TURN)).text == "a"


# Few characters, and so many ways to read a text that a mask takes a second.
AMBIGUOUS = "start: s\ns: " + "|".join(" s" * k for k in range(2, 60)) + ' | "a" | "b"'


def test_nobody_waits_for_a_slow_mask(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = answer(engine, GREEDY_40)
    go_on = threading.Event()
    compute = Matcher.compute

    def slow(self: Matcher, draft: Sequence[int]) -> np.ndarray:
        masks = compute(self, draft)  # its time has begun
        go_on.wait(30)
        return masks

    engine.grammars.compile(StructuredOutputsParams(regex="abc"))  # its first mask is known
    monkeypatch.setattr(Matcher, "compute", slow)
    engine.add_request("slow", PROMPT, structured(regex="abc", params={"n": 2, "temperature": 1}))
    engine.add_request("neighbour", PROMPT, GREEDY_40)
    ended: dict[str, CompletionOutput] = {}
    while "neighbour" not in ended:
        ended |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    assert_equal(ended["neighbour"], alone)
    assert "slow" not in ended
    engine.step()  # there is nothing to do
    go_on.set()
    assert [one.text for one in run(engine)["slow"].outputs] == ["abc"] * 2


def test_who_takes_too_long_fails_alone(
    engine: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = answer(engine, GREEDY_40)
    go_on = threading.Event()
    compute = Matcher.compute
    bounds = StructuredOutputsConfig(mask_time_limit=0.05)
    monkeypatch.setattr(engine._masks, "_config", bounds)
    engine.grammars.compile(StructuredOutputsParams(regex="abcd"))
    monkeypatch.setattr(Matcher, "compute", lambda *a: (compute(*a), go_on.wait(30))[0])
    engine.add_request("slow", PROMPT, structured(regex="abcd"))
    engine.add_request("neighbour", PROMPT, GREEDY_40)
    ended = run(engine)
    go_on.set()
    slow = ended["slow"].outputs[0]
    assert (slow.text, slow.finish_reason) == ("a", "error")
    assert slow.error == "the grammar takes more than 0.05 seconds for a token"
    assert_equal(ended["neighbour"].outputs[0], alone)
    engine.check()


def test_a_hostile_grammar_takes_its_own_time(engine: EngineCore) -> None:
    alone, on = answer(engine, GREEDY_40), {"logit_bias": {EOS: -100}}
    engine.add_request("hostile", PROMPT, structured(grammar=AMBIGUOUS, params=on))
    engine.add_request("neighbour", PROMPT, GREEDY_40)
    ended: dict[str, CompletionOutput] = {}
    times = []
    while "neighbour" not in ended:
        started = time.monotonic()
        ended |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
        times.append(time.monotonic() - started)
    assert_equal(ended["neighbour"], alone)
    assert sorted(times)[-2] < 0.3  # a step has 10 ms of patience, and a token's own time
    ended |= {name: output.outputs[0] for name, output in run(engine).items()}
    assert "items" in ended["hostile"].error
    engine.check()


def test_a_draft_is_looked_at_for_a_short_time(engine: EngineCore) -> None:
    matcher = engine.grammars.compile(StructuredOutputsParams(grammar=AMBIGUOUS)).matcher()
    started = time.monotonic()
    assert 0 < matcher.allowed_prefix(list(b"ab" * 32)) < 64
    assert time.monotonic() - started < 1  # all of them: longer than a minute
    matcher = engine.grammars.compile(StructuredOutputsParams(regex="(ab){20}")).matcher()
    assert matcher.allowed_prefix(list(b"ab" * 20)) == 40
    assert matcher.allowed_prefix(list(b"ab" * 6 + b"c" + b"ab")) == 12


def test_the_last_grammars_are_kept(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.grammars, "config", StructuredOutputsConfig(grammar_cache_size=2))
    compile = lambda regex: engine.grammars.compile(StructuredOutputsParams(regex=regex))
    first, second = compile("first"), compile("second")
    assert compile("first") is first
    compile("third")
    assert len(engine.grammars._cache) == 2
    assert compile("first") is first
    assert compile("second") is not second
