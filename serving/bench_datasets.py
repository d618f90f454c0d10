"""The calls of a benchmark: prompts, lengths of answers, and when they arrive."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("random", "sonnet", "custom", "trace")
_BLOCK = 512  # tokens that a hash id of a trace stands for
_SONNET = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee."""


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        prompt: text, or token ids.
        prompt_len: its tokens, if they are known.
        output_len: tokens of the answer.
        arrival: seconds after the start, if the data set says so.
    """

    prompt: str | list[int]
    prompt_len: int | None
    output_len: int
    arrival: float | None = None


Tokenize = Callable[[str], Sequence[int]]


def make_calls(
    name: str,
    count: int,
    input_len: int,
    output_len: int,
    *,
    path: Path | None,
    range_ratio: float,
    prefix_len: int,
    seed: int,
    tokenize: Tokenize,
) -> list[Call]:
    """Make the calls of a data set.

    Args:
        name: one of `NAMES`.
        count: of calls, at most.
        input_len: tokens of a prompt.
        output_len: tokens of an answer, where the data set does not say.
        path: of the file, for those that have one.
        range_ratio: lengths of `random` vary by this share in both directions.
        prefix_len: tokens that all prompts of `random` begin with.
        seed: of what is drawn.
        tokenize: asks the server.

    Raises:
        ValueError: the name is unknown, or the file is missing or none of its kind.
    """
    if name not in NAMES:
        raise ValueError(f"--dataset-name must be one of {', '.join(NAMES)}, got {name!r}")
    if (path is None) and name in ("custom", "trace"):
        raise ValueError(f"--dataset-name {name} needs --dataset-path")
    draw = random.Random(seed)
    if name == "custom" and path is not None:
        return _custom(path, count, output_len)
    if name == "trace" and path is not None:
        return _trace(path, count, draw, _vocabulary(tokenize))
    if name == "sonnet":
        text = _SONNET if path is None else path.read_text("utf-8")
        return _sonnet(text.splitlines(), count, input_len, output_len, draw, tokenize)
    vocabulary = _vocabulary(tokenize)
    prefix = draw.choices(vocabulary, k=prefix_len)

    def near(length: int) -> int:
        return max(1, round(length * (1 + range_ratio * (2 * draw.random() - 1))))

    lengths = [(near(input_len), near(output_len)) for _ in range(count)]
    return [Call(prefix + draw.choices(vocabulary, k=n), prefix_len + n, out) for n, out in lengths]


def _vocabulary(tokenize: Tokenize) -> list[int]:
    """Return tokens that any server of the model knows and that end nothing."""
    return sorted(set(tokenize(_SONNET))) or [0]


def _custom(path: Path, count: int, output_len: int) -> list[Call]:
    """Read lines of `{"prompt": ..., "output_tokens": ...}`."""
    calls = []
    for row in _rows(path, count):
        if not isinstance(row.get("prompt"), str | list):
            raise ValueError(f'{path} must hold lines of JSON like {{"prompt": "..."}}')
        calls.append(Call(row["prompt"], None, row.get("output_tokens") or output_len))
    return calls


def _trace(path: Path, count: int, draw: random.Random, vocabulary: Sequence[int]) -> list[Call]:
    """Read lines of `{"timestamp": milliseconds, "input_length": ..., "output_length": ...}`.

    `hash_ids`, if there are any, name blocks of the prompt: the same id is the same text.
    """
    calls, start = [], None
    for row in _rows(path, count):
        try:
            time, length = float(row["timestamp"]), int(row["input_length"])
            output = int(row["output_length"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: a line of a trace lacks or mistakes {error}") from error
        start = time if start is None else start
        blocks = [
            random.Random(block).choices(vocabulary, k=_BLOCK) for block in row.get("hash_ids", ())
        ]
        prompt = list(itertools.chain.from_iterable(blocks))[:length]
        prompt += draw.choices(vocabulary, k=length - len(prompt))
        calls.append(Call(prompt, length, max(output, 1), (time - start) / 1000))
    return calls


def _rows(path: Path, count: int) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, count) if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold lines of JSON objects")
    return rows


def _sonnet(
    lines: Sequence[str],
    count: int,
    input_len: int,
    output_len: int,
    draw: random.Random,
    tokenize: Tokenize,
) -> list[Call]:
    """Make prompts of lines in a random order, all with the same beginning."""
    first = "Pick as many lines as you can from these poem lines:\n"
    per_line = max(1, len(tokenize("\n".join(lines))) // len(lines))
    many = max(1, (input_len - len(tokenize(first))) // per_line)
    prompts = [first + "\n".join(draw.choices(lines, k=many)) + "\n" for _ in range(count)]
    return [Call(prompt, None, output_len) for prompt in prompts]


def arrivals(
    calls: Sequence[Call], request_rate: float, burstiness: float, seed: int
) -> list[float]:
    """Return when each call is sent, in seconds from the start.

    The gaps are gamma-distributed with shape `burstiness`: 1 is Poisson, less comes in bursts, more
    is even. What a trace says goes first.
    """
    if all(call.arrival is not None for call in calls):
        return [call.arrival or 0.0 for call in calls]
    if request_rate == float("inf"):
        return [0.0] * len(calls)
    draw = random.Random(seed)
    scale = 1 / (request_rate * burstiness)
    gaps = [draw.gammavariate(burstiness, scale) for _ in calls]
    # As many a second as was asked for, not as chance had it; the first at once.
    factor = len(calls) / request_rate / sum(gaps)
    return [factor * (time - gaps[0]) for time in itertools.accumulate(gaps)]
