"""How many of a speculator's drafts are accepted, by the engine itself. Host only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arctic_jax.llm import LLM
from arctic_jax.request import SamplingParams
from arctic_jax.training.generate import read_prompts, that_fit


def evaluate(
    llm: LLM, files: Sequence[Path], limit: int | None = None, max_tokens: int = 256
) -> dict[str, dict[str, Any]]:
    """Answer prompts greedily with drafts, and count what came of these.

    Args:
        llm: with a `speculative_config`.
        files: of prompts or conversations, see `read_prompts`; of these the last answer is left
            out.
        limit: so many prompts of each; `None` for all.
        max_tokens: of an answer.

    Returns:
        For each file's name: `prompts`, `tokens`, `drafted` and `accepted` tokens, `acceptance`
        (the share of the drafted that was accepted), `acceptance_by_position`, `tokens_per_step`
        of a request, and `tokens_per_s` of all.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    results = {}
    for path in files:
        conversations = that_fit(llm, list(read_prompts([path]))[:limit], max_tokens)
        before = _counts(llm)
        start = time.perf_counter()
        outputs = llm.chat(conversations, params)
        seconds = time.perf_counter() - start
        drafted, accepted = (now - then for now, then in zip(_counts(llm), before, strict=True))
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        results[path.stem] = {
            "prompts": len(conversations),
            "tokens": tokens,
            "drafted": int(drafted.sum()),
            "accepted": int(accepted.sum()),
            "acceptance": float(accepted.sum() / max(drafted.sum(), 1)),
            "acceptance_by_position": (accepted / np.maximum(drafted, 1)).round(4).tolist(),
            "tokens_per_step": tokens / max(tokens - int(accepted.sum()), 1),
            "tokens_per_s": tokens / seconds,
        }
    return results


def _counts(llm: LLM) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens drafted and accepted so far by position, of all engines."""
    stats = llm.engine.speculation_stats
    drafted, accepted = [s.drafted for s in stats], [s.accepted for s in stats]
    return np.sum(drafted, axis=0), np.sum(accepted, axis=0)
