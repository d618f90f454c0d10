"""Tokenizers from a directory and from a GGUF file give the same ids."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from arctic_jax.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from arctic_jax.loading.tokenizer import load_tokenizer
from arctic_jax.testing import (
    TINY_CHAT_TEMPLATE,
    TINY_EOS_TOKEN_ID,
    TINY_VOCAB_SIZE,
    write_gguf,
    write_model,
    write_tokenizer,
)

TEXT = "Hello wörld, it's 12345 o'clock;\n\n  don't \t panic… ½ 日本語 🌡️ I'LL SEE, HTTPServer <x>  "
TRAINING = [TEXT, Path(gguf.__file__).with_name("constants.py").read_text("utf-8")[:20_000]]
LLAMA3_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_RULE = LLAMA3_RULE.replace("{1,3}", "")


def resident() -> float:
    """MiB of the process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_strangers_words_are_not_kept_for_ever(tmp_path):
    """The library keeps words of each thread that encodes: here 40 MiB, if nobody bounds it."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=250)) for _ in range(5000)]
    with ThreadPoolExecutor(1) as threads:
        list(threads.map(tokenizer.encode, words[:100]))
        before = resident()
        list(threads.map(tokenizer.encode, words))
        assert resident() - before < 20


def test_directory(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    ids = tokenizer.encode(TEXT)
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.vocab_size == TINY_VOCAB_SIZE
    assert tokenizer.eos_token_id == TINY_EOS_TOKEN_ID
    assert tokenizer.bos_token_id == 256
    assert tokenizer.encode("<|eos|>a") == [257, 97]
    assert tokenizer.decode([257, 97]) == "a"
    assert tokenizer.decode([257, 97], skip_special_tokens=False) == "<|eos|>a"
    assert tokenizer.convert_ids_to_tokens([257, 97, 32, 9999]) == ["<|eos|>", "a", "Ġ", ""]
    assert isinstance(tokenizer.backend, tokenizers.Tokenizer)
    assert tokenizer.hf.eos_token == "<|eos|>"


def test_gguf_equals_the_directory(tmp_path):
    directory = write_model(tmp_path / "model")
    from_gguf = load_tokenizer(write_gguf(tmp_path / "model.gguf", directory))
    from_directory = load_tokenizer(directory)
    chat = [{"role": "user", "content": TEXT}]
    assert from_gguf.encode(TEXT + "<|eos|>") == from_directory.encode(TEXT + "<|eos|>")
    assert from_gguf.apply_chat_template(chat) == from_directory.apply_chat_template(chat)
    assert from_gguf.eos_token_id == from_directory.eos_token_id
    assert from_gguf.vocab_size == from_directory.vocab_size
    assert from_gguf.hf.chat_template == TINY_CHAT_TEMPLATE


def write_vocabulary(path: Path, keys: dict[str, Any]) -> Path:
    """Write a GGUF file that holds nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        key = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(splits: list[Any], ignore_merges: bool = False) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def vocabulary(tokenizer: tokenizers.Tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def byte_level_keys(tokenizer: tokenizers.Tokenizer, rule: str) -> dict[str, Any]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = vocabulary(tokenizer)
    return {
        "model": "gpt2",
        "pre": rule,
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
NO_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("rule", "splits", "begins"),
    [
        ("gpt-2", [GPT2_SPLIT], False),
        ("default", [GPT2_SPLIT], False),
        ("smollm", [pre_tokenizers.Digits(individual_digits=True), GPT2_SPLIT], False),
        (
            "llama-bpe",
            [pre_tokenizers.Split(Regex(LLAMA3_RULE), "isolated"), NO_SPLIT],
            True,
        ),
        ("qwen2", [pre_tokenizers.Split(Regex(QWEN2_RULE), "isolated"), NO_SPLIT], False),
    ],
)
def test_byte_level_rules(tmp_path, rule, splits, begins):
    original = byte_level(splits, ignore_merges=begins)
    keys = byte_level_keys(original, rule)
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "t.gguf", keys))
    for text in [*TRAINING, "  two  spaces", ""]:
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("x</s>")[-1] == 1
    assert (tokenizer.encode("x")[0] == 0) == begins
    keys["add_bos_token"] = not begins
    keys["add_eos_token"] = True
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "t.gguf", keys))
    assert (tokenizer.encode("x")[0] == 0) != begins
    assert tokenizer.encode("x")[-1] == 1
    assert 1 not in tokenizer.encode("x", add_special_tokens=False)


def sentencepiece_keys() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A BPE with byte fallback as Llama 2 has it, and its vocabulary with scores."""
    original = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    original.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    original.train_from_iterator(
        [word for text in TRAINING for word in text.split(" ") if word.isascii()],
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False),
    )
    state = json.loads(original.to_str())
    # Only three are added tokens: bytes are ordinary entries of the vocabulary.
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < 3]
    original = tokenizers.Tokenizer.from_str(json.dumps(state))
    original.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokens = vocabulary(original)
    ranks = {"".join(merge): i for i, merge in reversed([*enumerate(state["model"]["merges"])])}
    return original, {
        "model": "llama",
        "tokens": tokens,
        "scores": [float(-ranks.get(token, 0)) for token in tokens],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def test_sentencepiece(tmp_path):
    original, keys = sentencepiece_keys()
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "s.gguf", keys))
    for text in [TEXT, "import pytest", " leading", "日本", "def f(x):\n    return x"]:
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("x")[0] == 1
    keys["add_space_prefix"] = False
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "s.gguf", keys))
    assert tokenizer.decode(tokenizer.encode(" x")) == " x"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("import"))[1][0] != "▁"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pre": "martian"}, UnsupportedModelError, "'martian'"),
        ({"model": "bert"}, UnsupportedModelError, "'bert'"),
        ({"tokens": []}, CheckpointError, "no tokenizer"),
        ({"tokens": ["a", "a", "b"]}, CheckpointError, "1 token"),
        ({"merges": ["q z!"]}, CheckpointError, "inconsistent"),
        ({"merges": ["nospace"]}, CheckpointError, "inconsistent"),
        ({"eos_token_id": 99999}, CheckpointError, "99999"),
        ({"model": "llama"}, CheckpointError, "scores"),
    ],
)
def test_a_vocabulary_that_cannot_be_used(tmp_path, changes, error, message):
    keys = byte_level_keys(byte_level([GPT2_SPLIT]), "gpt-2") | changes
    keys = {key: value for key, value in keys.items() if value != []}
    with pytest.raises(error, match=message):
        load_tokenizer(write_vocabulary(tmp_path / "t.gguf", keys))


def test_nothing_from_a_repository_is_executed(tmp_path):
    write_tokenizer(tmp_path)
    mark = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: ...\n")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    path.write_text(json.dumps(config))
    try:
        tokenizer = load_tokenizer(tmp_path)
    except CheckpointError:
        pass  # refusing is as good as ignoring
    else:
        assert tokenizer.encode("a") == [97]
    assert not mark.exists()


def test_what_is_not_there(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no tokenizer could be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class":"PreTrainedTokenizerFast"}')
    for text in ("{broken", "[]", '{"model": 3}', '{"version": "1.0", "model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match="no tokenizer could be read"):
            load_tokenizer(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        load_tokenizer(tmp_path / "cut.gguf")
