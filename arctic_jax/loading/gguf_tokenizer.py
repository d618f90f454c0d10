"""The tokenizer that a GGUF file describes, rebuilt as a `tokenizers.Tokenizer`. Host only.

A file stores the vocabulary, the merges (or the scores that imply them) and the *name* of the rule
that cuts text into words. What a name means is llama.cpp's convention; the table here holds the
rules of the supported model families. A name that is not in it is refused, because a wrong rule
gives plausible text and wrong tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from arctic_jax.errors import CheckpointError, UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name -> (patterns applied in turn, whether a whole word in the vocabulary skips the merges)
_WORD_RULES: dict[str, tuple[tuple[str, ...], bool]] = {
    "default": ((_GPT2,), False),
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "llama-bpe": ((_LLAMA3,), True),
    "llama-v3": ((_LLAMA3,), True),
    "llama3": ((_LLAMA3,), True),
    "qwen2": ((_QWEN2,), False),
    "deepseek-r1-qwen": ((_QWEN2,), False),
    "tekken": ((_TEKKEN,), True),
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def build(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer, and its special tokens by name (`bos_token`, `eos_token`, …).

    Raises:
        CheckpointError: the vocabulary is missing or inconsistent.
        UnsupportedModelError: the kind of tokenizer or its word rule is not implemented.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError("the GGUF file holds no tokenizer (tokenizer.ggml.tokens)")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        # `tokenizers` maps tokens to ids and would lose all but the last of two alike.
        raise CheckpointError(f"{len(tokens) - len(vocabulary)} token(s) occur twice in the file")
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            tokenizer, begins = _byte_level(metadata, vocabulary)
        elif kind == "llama":
            tokenizer, begins = _sentencepiece(metadata, vocabulary, types), True
        else:
            raise UnsupportedModelError(f"tokenizer.ggml.model {kind!r} is not supported")
    except UnsupportedModelError:
        raise
    except Exception as error:  # `tokenizers` raises plain Exception for a bad merge
        raise CheckpointError(f"the GGUF file's tokenizer is inconsistent: {error}") from error

    for i, (token, what) in enumerate(zip(tokens, types, strict=False)):
        if token and what in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, normalized=False, special=what == _CONTROL)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
            if tokenizer.token_to_id(token) != i:
                raise CheckpointError(f"token {token!r} has id {i} in the file")
    special = {}
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        number = metadata.get(f"tokenizer.ggml.{key}")
        if number is not None:
            if not 0 <= number < len(tokens):
                raise CheckpointError(f"tokenizer.ggml.{key} {number} is not in the vocabulary")
            special[name] = tokens[number]
    first = metadata.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in special
    last = metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in special
    if first or last:
        ends = [special["bos_token"]] * first + ["$A"] + [special["eos_token"]] * last
        used = {token: vocabulary[token] for token in ends if token != "$A"}
        template = processors.TemplateProcessing(
            single=ends, pair=[*ends, "$B"], special_tokens=list(used.items())
        )
        tokenizer.post_processor = template
    return tokenizer, special


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule not in _WORD_RULES:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre {rule!r} is not supported; supported: {', '.join(_WORD_RULES)}"
        )
    patterns, ignore_merges = _WORD_RULES[rule]
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, ignore_merges  # the same families begin with BOS unless the file says no


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], types: Sequence[int]
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise CheckpointError("tokenizer.ggml.scores does not match the vocabulary")
    usable = {t for t, what in zip(vocabulary, types, strict=False) if what in (_NORMAL, _UNUSED)}
    merges = []
    for token in usable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                score = scores[vocabulary[token]]
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges.sort()  # SentencePiece joins the pair whose result scores best
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in merges],
            unk_token=None if unknown is None else list(vocabulary)[unknown],
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ending = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    return tokenizer
