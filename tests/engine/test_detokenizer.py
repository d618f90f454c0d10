"""Streamed text against one-shot decoding, and the strings that end it."""

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from arctic_jax.engine.detokenizer import TextStream
from arctic_jax.loading import hub
from arctic_jax.loading.tokenizer import load_tokenizer, numbered_tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """One token for each byte, some for words, and a special one."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["Hello", "Ġworld", "st", "op", "END"]
    vocabulary = {token: i for i, token in enumerate([*sorted(alphabet), *words])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens(["<|eos|>"])
    return made


def sentencepiece() -> tokenizers.Tokenizer:
    """Words with a leading mark that is a space but at the start, and bytes for the rest."""
    words = ["▁", "▁Hello", "▁world", "lo", "▁the", "é", "x"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", *bytes_, *words])}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>"])
    return made


BYTES, PIECES = byte_level(), sentencepiece()


def stream_of(
    tokenizer: tokenizers.Tokenizer = BYTES,
    stop: Iterable[str] = (),
    include_stop: bool = False,
    skip_special_tokens: bool = True,
    prompt: Iterable[int] = (),
) -> TextStream:
    return TextStream(tokenizer, list(prompt), list(stop), include_stop, skip_special_tokens)


def spell(*tokens: str, tokenizer: tokenizers.Tokenizer = BYTES) -> list[int]:
    """Ids of these tokens; what is not in the vocabulary is spelled byte by byte."""
    ids = []
    for token in tokens:
        known = tokenizer.token_to_id(token.replace(" ", "Ġ")) if len(token) > 1 else None
        ids += tokenizer.encode(token).ids if known is None else [known]
    return ids


def push_all(stream: TextStream, ids: Iterable[int]) -> tuple[str | None, list[str]]:
    """Push until something stops the answer; the visible text after each token."""
    seen = []
    for token in ids:
        stop = stream.push(token)
        stream.flush()
        if stop is not None:
            return stop, seen
        seen.append(stream.visible)
    return None, seen


def check_growth(seen: list[str], end: str) -> None:
    """A reader who prints only what is new prints all of the text and nothing else."""
    for earlier, later in itertools.pairwise([*seen, end]):
        assert later.startswith(earlier)


def test_characters_wait_for_their_last_byte() -> None:
    stop, seen = push_all(stream := stream_of(), spell("a", "😀", "é", "b"))
    assert stop is None
    assert seen == ["a", "a", "a", "a", "a😀", "a😀", "a😀é", "a😀éb"]
    assert stream.text == "a😀éb"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens(include: bool) -> None:
    stream = stream_of(stop=["stop"], include_stop=include)
    stop, seen = push_all(stream, spell("Hello", " ", "st", "op", "x"))
    assert stop == "stop"
    assert seen == ["Hello", "Hello ", "Hello "]
    assert stream.text == ("Hello stop" if include else "Hello ")
    check_growth(seen, stream.text)


def test_a_stop_string_that_begins_and_ends_inside_of_tokens() -> None:
    stream = stream_of(stop=["lo wor"])
    stop, seen = push_all(stream, spell("Hello", " world"))
    assert stop == "lo wor"
    assert seen == ["Hel"]
    assert stream.text == "Hel"


def test_text_after_a_stop_string_in_the_same_token_is_cut() -> None:
    for include, text in ((False, "E"), (True, "EN")):
        stream = stream_of(stop=["N"], include_stop=include)
        assert stream.push(spell("END")[0]) == "N"
        assert stream.text == text


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_of_an_emoji_and_its_neighbours(include: bool) -> None:
    stream = stream_of(stop=["b😀c"], include_stop=include)
    stop, seen = push_all(stream, spell("a", "b", "😀", "d", "b", "😀", "c", "e"))
    assert stop == "b😀c"
    assert seen[:6] == ["a", "a", "a", "a", "a", "a"]  # b, and then b😀, are held back
    assert seen[6] == "ab😀d"
    assert stream.text == ("ab😀db😀c" if include else "ab😀d")
    check_growth(seen, stream.text)


def test_the_earliest_of_several_stop_strings_wins() -> None:
    # All three are complete with the same token.
    for stops in itertools.permutations(["ND", "END", "D"]):
        stream = stream_of(stop=stops)
        assert push_all(stream, spell("x", "END"))[0] == "END"
        assert stream.text == "x"


def test_a_stop_string_inside_a_longer_one_is_complete_first() -> None:
    stream = stream_of(stop=["abcd", "bc"])
    assert push_all(stream, spell("x", "a", "b", "c", "d"))[0] == "bc"
    assert stream.text == "xa"


def test_what_was_held_back_is_released() -> None:
    stream = stream_of(stop=["stop it"])
    stop, seen = push_all(stream, spell("Hello", "st", "op", " ", "x", "st"))
    assert stop is None
    assert seen == ["Hello", "Hello", "Hello", "Hello", "Hellostop x", "Hellostop x"]
    assert stream.text == "Hellostop xst"  # what an answer that ends here shows


def test_a_held_end_may_be_the_beginning_of_itself() -> None:
    stream = stream_of(stop=["aab"])
    assert push_all(stream, spell("a", "a", "a", "b"))[0] == "aab"
    assert stream.text == "a"


def test_stop_strings_of_before_min_tokens_do_not_stop_later() -> None:
    stream = stream_of(stop=["st", "a very long stop string"])
    for token in spell("Hello", "st"):
        assert stream.push(token, may_stop=False) is None
    assert stream.push(spell("x")[0]) is None
    assert stream.push(spell("st")[0]) == "st"
    assert stream.text == "Hellostx"


def test_a_stop_string_may_begin_before_min_tokens() -> None:
    stream = stream_of(stop=["stop"])
    assert stream.push(spell("st")[0], may_stop=False) is None
    assert stream.push(spell("op")[0]) == "stop"
    assert stream.text == ""


def test_special_tokens() -> None:
    ids = spell("Hello", "<|eos|>", " world")
    hidden, shown = stream_of(), stream_of(skip_special_tokens=False)
    push_all(hidden, ids)
    push_all(shown, ids)
    assert hidden.text == "Hello world"
    assert shown.text == "Hello<|eos|> world"


def test_a_special_token_as_stop_string() -> None:
    stream = stream_of(stop=["<|eos|>"], skip_special_tokens=False)
    assert push_all(stream, spell("Hello", "<|eos|>", "x"))[0] == "<|eos|>"
    assert stream.text == "Hello"


def test_bytes_that_are_no_text_do_not_stop_the_stream() -> None:
    lone = BYTES.encode("é").ids[1]
    stream = stream_of()
    push_all(stream, [*spell("a"), lone, lone, *spell("b", "😀")])
    assert stream.text == "a��b😀"


def test_tokens_that_the_tokenizer_does_not_know_are_empty() -> None:
    stream = stream_of()
    push_all(stream, [*spell("a"), 10_000, *spell("b")])
    assert stream.text == "ab"


def pieces(*tokens: str) -> list[int]:
    ids = [PIECES.token_to_id(token) for token in tokens]
    assert None not in ids
    return ids  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "world the"),  # the first word of a text loses its space
        (["<s>"], "world the"),
        (["<s>", "▁Hello"], " world the"),
        (["<s>", *["▁Hello"] * 30], " world the"),
        (["▁Hello", "<0xF0>", "<0x9F>"], "world the"),  # cut in the middle of a character
        (["<0x80>", "▁Hello"], "world the"),
        (["<0x80>", *["▁Hello"] * 5], " world the"),
    ],
)
def test_an_answer_continues_its_prompt(prompt: list[str], text: str) -> None:
    stream = stream_of(PIECES, prompt=pieces(*prompt))
    push_all(stream, pieces("▁world", "▁the"))
    assert stream.text == text


def test_nothing_of_the_prompt_is_repeated() -> None:
    emoji = BYTES.encode("😀").ids
    stream = stream_of(prompt=[*spell("Hello", " world"), *emoji[:2]])
    push_all(stream, [*emoji[2:], *spell("x")])
    assert "Hello" not in stream.text
    assert stream.text.endswith("x")


def test_bytes_that_change_the_text_before_them_are_survived() -> None:
    # ByteFallback decodes a run of bytes as a whole: "A" becomes "��" when an invalid byte follows.
    stream = stream_of(PIECES)
    push_all(stream, pieces("x", "<0x41>", "<0xFF>", "x", "▁world", "<0x42>"))
    assert stream.text.startswith("xA")
    assert stream.text.endswith("worldB")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(PIECES.get_vocab()) + 5), max_size=30))
def test_any_tokens_of_a_sentencepiece_vocabulary_stream(ids: list[int]) -> None:
    stop, seen = push_all(stream := stream_of(PIECES), ids)
    assert stop is None
    check_growth(seen, stream.text)


TEXT = st.text(st.sampled_from("ab é😀\n<>🇩🇪한"), max_size=20)


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT)
def test_streamed_text_is_one_shot_text(prompt: str, text: str) -> None:
    ids = BYTES.encode(text).ids
    stop, seen = push_all(stream := stream_of(prompt=BYTES.encode(prompt).ids), ids)
    assert stop is None
    assert stream.text == text
    check_growth(seen, text)


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from("ab😀"), max_size=12),
    st.lists(st.text(st.sampled_from("ab😀"), min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_any_stop_strings(text: str, stops: list[str], include: bool) -> None:
    """Characters come one by one, so the first that is complete is the one that ends first."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    stop, seen = push_all(stream := stream_of(stop=stops, include_stop=include), spell(*text))
    if not ends:
        assert stop is None
        assert stream.text == text
    else:
        end, _, first = min(ends)
        assert stop == first
        assert stream.text == text[: end if include else end - len(first)]
    check_growth(seen, stream.text)


def test_numbered_words_are_separated() -> None:
    stream = stream_of(numbered_tokenizer(10).backend, prompt=[1, 2])
    push_all(stream, [3, 4])
    assert stream.text == " <3> <4>"


MODEL = hub.cache_directory() / hub.SMOLLM2.directory


@pytest.mark.skipif(not MODEL.is_dir(), reason="the default model is not in the cache")
def test_the_default_models_tokenizer() -> None:
    tokenizer = load_tokenizer(MODEL)
    text = 'Grüße, 世界! 😀👩‍👩‍👧 naïve\tx = {"a": [1, 2]}\n\n  def f():\n    pass — ½ 🇩🇪'
    ids = tokenizer.encode(text)
    stop, seen = push_all(stream := stream_of(tokenizer.backend), ids)
    assert stop is None
    assert stream.text == text == tokenizer.decode(ids)
    check_growth(seen, text)
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, tokenizer.vocab_size, 50).tolist() + tokenizer.encode(" end")
        _, seen = push_all(stream := stream_of(tokenizer.backend), ids)
        assert stream.text == tokenizer.decode(ids)
        check_growth(seen, stream.text)
