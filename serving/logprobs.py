"""Log-probabilities in the forms of the two endpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from arctic_jax.request import Logprob, PositionLogprobs
from arctic_jax.serving.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_LOWEST = -9999.0  # JSON has no minus infinity


class CompletionLogprobsWriter:
    """Makes the lists of one answer, piece by piece; offsets count from its beginning.

    Args:
        as_token_ids: name tokens `token_id:N`.
        spell: the text of a token of which nothing else is known.
    """

    def __init__(self, as_token_ids: bool, spell: Callable[[int], str]) -> None:
        self._as_token_ids = as_token_ids
        self._spell = spell
        self._offset = 0

    def write(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None], most: int
    ) -> CompletionLogprobs:
        """Make the lists of some tokens, with at most so many alternatives each.

        Args:
            token_ids: of the prompt or of the answer.
            positions: what could have come there; `None` for a prompt's first token.
            most: alternatives; the token itself comes in addition if it is not among them.
        """
        lists = CompletionLogprobs.empty()
        for token, position in zip(token_ids, positions, strict=True):
            logprob = Logprob(0, None, self._spell(token)) if position is None else position[token]
            text = _name(token, logprob, self._as_token_ids)
            lists.tokens.append(text)
            lists.text_offset.append(self._offset)
            self._offset += len(text)
            if position is None:
                lists.token_logprobs.append(None)
                lists.top_logprobs.append(None)
                continue
            lists.token_logprobs.append(_finite(logprob.logprob))
            top: dict[str, float] = {}
            for t in _likeliest(position, token, most):
                # Tokens that are parts of characters share a name; the likeliest has it, or a
                # token would seem to be the likeliest that is not.
                name = _name(t, position[t], self._as_token_ids)
                top.setdefault(name, _finite(position[t].logprob))
            lists.top_logprobs.append(top)
        return lists


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs],
    most: int,
    as_token_ids: bool,
) -> ChatLogprobs:
    """Make the list of some tokens of an answer, with so many alternatives each."""

    def one(token: int, logprob: Logprob) -> dict[str, Any]:
        text = _name(token, logprob, as_token_ids)
        return {
            "token": text,
            "logprob": _finite(logprob.logprob),
            "bytes": list(text.encode("utf-8", "replace")),
        }

    content = []
    for token, position in zip(token_ids, positions, strict=True):
        likeliest = sorted(position, key=lambda t: position[t].rank or 0)[:most]
        top = [TopLogprob(**one(t, position[t])) for t in likeliest]
        content.append(TokenLogprob(**one(token, position[token]), top_logprobs=top))
    return ChatLogprobs(content=content)


def prompt_logprobs(
    positions: Sequence[PositionLogprobs | None] | None,
) -> list[dict[str, Any] | None] | None:
    """Make vLLM's form: for each position an object from token ids to what is known of them."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token): {
                "logprob": _finite(logprob.logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token, logprob in position.items()
        }
        for position in positions
    ]


def _name(token: int, logprob: Logprob, as_token_ids: bool) -> str:
    return f"token_id:{token}" if as_token_ids else logprob.decoded_token or ""


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _likeliest(position: PositionLogprobs, token: int, most: int) -> list[int]:
    """Return the likeliest tokens, best first, and the one that came even if it is not one."""
    ranked = sorted(position, key=lambda t: position[t].rank or 0)
    return ranked[:most] + ([token] if token not in ranked[:most] else [])
