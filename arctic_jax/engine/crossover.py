"""Where the layout for many tokens becomes faster than the one for few. Engine start only.

Measured on the machine, with the programs that serve requests, and kept on disk for the next start.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from arctic_jax.config import StepLimits
from arctic_jax.loading import hub
from arctic_jax.request import Request, SamplingParams
from arctic_jax.scheduled_batch import ScheduledBatch, ScheduledRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Crossover:
    """Where one layout becomes faster than the other.

    Attributes:
        threshold: steps of at most so many tokens run in the layout for few.
        tokens: of the steps that were measured, ascending; empty if the user gave the threshold.
        few_ms: their times in the layout for few tokens, in milliseconds.
        many_ms: their times in the layout for many.
    """

    threshold: int
    tokens: tuple[int, ...] = ()
    few_ms: tuple[float, ...] = ()
    many_ms: tuple[float, ...] = ()

    @staticmethod
    def of(tokens: Sequence[int], few_ms: Sequence[float], many_ms: Sequence[float]) -> Crossover:
        """Find it in measured times: the layout for few is kept until it first loses."""
        threshold = 0
        for count, few, many in zip(tokens, few_ms, many_ms, strict=True):
            if few > many:
                break
            threshold = count
        return Crossover(threshold, tuple(tokens), tuple(few_ms), tuple(many_ms))


def tokens_to_measure(multiple: int, max_num_batched_tokens: int) -> list[int]:
    """Powers of two up to a step's limit; all multiples of the devices that share the tokens."""
    counts = (multiple << i for i in range(32))
    return [n for n in counts if 8 <= n <= max_num_batched_tokens] or [max_num_batched_tokens]


def probe(num_tokens: int, limits: StepLimits, max_model_len: int, blocks: int) -> ScheduledBatch:
    """Make a step of `num_tokens`: of requests that generate, or of prompts if those are too few.

    Its keys and values go to blocks that nobody holds, of which there are `blocks` for a request.
    """
    length = 1 if num_tokens <= limits.max_num_seqs else max_model_len
    parts = []
    for slot, start in enumerate(range(0, num_tokens, length)):
        tokens = min(length, num_tokens - start)
        request = Request(f"probe-{slot}", 0, [0] * tokens, SamplingParams(temperature=0), 1)
        request.slot, request.block_ids = slot, list(range(blocks))
        parts.append(ScheduledRequest(request, 0, tokens, 1, True))
    return ScheduledBatch(tuple(parts))


class CrossoverStore:
    """A measured crossover on disk, found by all that decides it.

    Args:
        what: model, hardware, versions and so on, with telling `repr`s.
    """

    def __init__(self, *what: object) -> None:
        digest = hashlib.sha256(repr(what).encode()).hexdigest()
        self._path: Path = hub.cache_directory() / "crossovers" / f"{digest}.json"

    def load(self) -> Crossover | None:
        """Return what was measured before, if anything was."""
        if not self._path.exists():
            return None
        try:
            kept = json.loads(self._path.read_text())
            return Crossover.of(kept["tokens"], kept["few_ms"], kept["many_ms"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged and measured anew: %s", self._path, error)
            return None

    def save(self, crossover: Crossover) -> None:
        """Keep it for the next start."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(asdict(crossover), indent=1) + "\n")
        except OSError as error:
            logger.warning("the crossover could not be kept in %s: %s", self._path, error)
