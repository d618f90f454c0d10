"""Which layout and bucket a step runs in, and where one layout becomes faster than the other.

Owned by the runner. For few tokens the weights are what must be read, and the layout that splits
them over all devices wins; for many tokens the products are what must be computed, and the layout
that splits the tokens wins, as it exchanges less (shift parallelism: Hidayetoglu et al. 2025). The
number of tokens where this turns is measured at the first start and kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from arctic_jax.batch import Bucket, ScheduledBatch
from arctic_jax.shift_parallel import MeshLayout

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


class LayoutPicker:
    """Chooses for every step.

    Args:
        ladders: the shapes that each layout could be compiled in. One layout, or first the one for
            few tokens and then the one for many.
        threshold: see `Crossover`.
    """

    def __init__(self, ladders: Mapping[MeshLayout, Sequence[Bucket]], threshold: int) -> None:
        self._threshold = threshold
        self._ladders = {layout: tuple(sorted(ladder)) for layout, ladder in ladders.items()}
        if len(self._ladders) == 2:
            few, many = self._ladders
            self._ladders[few] = _serving(self._ladders[few], 1, threshold)
            self._ladders[many] = _serving(self._ladders[many], threshold + 1, None)

    @property
    def steps(self) -> list[tuple[MeshLayout, Bucket]]:
        """All that can be picked."""
        return [(layout, b) for layout, ladder in self._ladders.items() for b in ladder]

    def pick(self, scheduled: ScheduledBatch) -> tuple[MeshLayout, Bucket]:
        """Choose the layout by the step's tokens, and its smallest shape that fits.

        Raises:
            ValueError: no shape fits; the scheduler's limits and the ladders disagree.
        """
        layouts = list(self._ladders)
        layout = layouts[0] if scheduled.num_tokens <= self._threshold else layouts[-1]
        return layout, Bucket.fit(scheduled, self._ladders[layout])


def _serving(ladder: Sequence[Bucket], fewest: int, most: int | None) -> tuple[Bucket, ...]:
    """Return the shapes that steps of `fewest` to `most` tokens fit best; all above for `None`."""
    kinds: dict[int, list[Bucket]] = {}
    for bucket in ladder:  # those of decode steps, of mixed steps, of steps with many rows
        kinds.setdefault(0 if bucket.max_query_len == 1 else bucket.num_rows, []).append(bucket)
    kept = []
    for rungs in kinds.values():
        below = 0
        for bucket in rungs:
            if bucket.num_tokens >= fewest and (most is None or below < most):
                kept.append(bucket)
            below = bucket.num_tokens
    return tuple(sorted(kept))


def tokens_to_measure(multiple: int, max_num_batched_tokens: int) -> list[int]:
    """Powers of two up to a step's limit; all multiples of the devices that share the tokens."""
    counts = (multiple << i for i in range(32))
    return [n for n in counts if 8 <= n <= max_num_batched_tokens] or [max_num_batched_tokens]


class CrossoverStore:
    """Measured crossovers on disk, found by all that decides them.

    Args:
        directory: where the files are; `None` to keep nothing.
        what: model, hardware, versions and so on, with telling `repr`s.
    """

    def __init__(self, directory: Path | None, *what: object) -> None:
        digest = hashlib.sha256(repr(what).encode()).hexdigest()
        self._path = None if directory is None else directory / f"{digest}.json"

    def load(self) -> Crossover | None:
        """Return what was measured before, if anything was."""
        if self._path is None or not self._path.exists():
            return None
        try:
            kept = json.loads(self._path.read_text())
            return Crossover.of(kept["tokens"], kept["few_ms"], kept["many_ms"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged and measured anew: %s", self._path, error)
            return None

    def save(self, crossover: Crossover) -> None:
        """Keep it for the next start."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(asdict(crossover), indent=1) + "\n")
        except OSError as error:
            logger.warning("the crossover could not be kept in %s: %s", self._path, error)
