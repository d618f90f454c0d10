"""Which layout and bucket a step runs in. Owned by the runner.

For few tokens the weights are what must be read, and the layout that splits them over all devices
wins; for many tokens the products are what must be computed, and the layout that splits the tokens
wins, as it exchanges less (shift parallelism: Hidayetoglu et al. 2025). `crossover.py` says where
this turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arctic_jax.scheduled_batch import Bucket, ScheduledBatch
from arctic_jax.shift_parallel import MeshLayout


class LayoutPicker:
    """Chooses for every step.

    Args:
        ladders: the shapes that each layout could be compiled in. One layout, or first the one for
            few tokens and then the one for many.
        threshold: steps of at most so many tokens run in the layout for few.
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
    kinds: dict[tuple[int, int], list[Bucket]] = {}
    # Those of decode and of verification steps, of mixed ones, of those with many rows.
    for bucket in ladder:
        has_all_rows = bucket.num_rows == bucket.num_tokens
        kind = -bucket.max_query_len if has_all_rows else bucket.num_rows
        kinds.setdefault((kind, bucket.num_rounds), []).append(bucket)
    kept = []
    for rungs in kinds.values():
        for bucket in rungs:
            smaller = [b.num_tokens for b in rungs if b.num_tokens < bucket.num_tokens]
            below = max(smaller, default=0)
            if bucket.num_tokens >= fewest and (most is None or below < most):
                kept.append(bucket)
    return tuple(sorted(kept))
