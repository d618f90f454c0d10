"""Which tokens the grammars of a step's requests allow, as bits for the device. Host only, no jax.

Owned by the runner. A row that draws has a mask of its own: of the known tokens, or of these and
the drafted ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from arctic_jax.batch import ScheduledBatch
from arctic_jax.engine.grammar_compiler import Matcher
from arctic_jax.engine.sampler import MASKS_A_CALL

if TYPE_CHECKING:  # it is loaded when the first grammar comes
    from llguidance import LLExecutor, LLMatcher


class GrammarMasks:
    """Fills masks; several threads share the work."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._executor: LLExecutor | None = None

    def fill(self, scheduled: ScheduledBatch) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Give each part that draws by a grammar its `first_mask`; yield the masks in groups.

        Yields:
            What `sampler.set_masks` takes: the first mask's number, `masks`, and `rows`.
        """
        found = [
            (part, part.request.matcher)
            for part in scheduled.requests
            if part.num_draws and isinstance(part.request.matcher, Matcher)
        ]
        if not found:
            return
        num_masks = sum(part.num_draws for part, _ in found)
        num_masks += -num_masks % MASKS_A_CALL
        num_words = found[0][1].num_words
        # What follows a draft's end keeps all bits: those rows count for nothing.
        masks = np.full((num_masks, num_words), -1, np.int32)
        rows = np.zeros(num_masks, np.int32)
        plain, drafted, first = [], [], 0
        for part, matcher in found:
            part.first_mask, end = first, first + part.num_draws
            rows[first:end] = part.request.slot
            if part.num_drafted:
                drafts = part.request.token_ids[part.end - part.num_drafted : part.end]
                drafted.append((matcher.state, first, drafts))
            else:
                plain.append((matcher.state, first))
            first = end
        self._compute(plain, drafted, masks)
        masks = masks[:, : -(-self.vocab_size // 32)]
        for first in range(0, num_masks, MASKS_A_CALL):
            group = slice(first, first + MASKS_A_CALL)
            yield first, np.ascontiguousarray(masks[group]), rows[group]

    def _compute(
        self,
        plain: list[tuple[LLMatcher, int]],
        drafted: list[tuple[LLMatcher, int, list[int]]],
        masks: np.ndarray,
    ) -> None:
        """Fill masks from the given row on: one, or one more than there are drafted tokens."""
        from llguidance import LLExecutor
        from llguidance import numpy as bits

        if self._executor is None:
            self._executor = LLExecutor()
        if plain:
            bits.fill_next_token_bitmask_par(self._executor, plain, masks)
        if drafted:
            bits.fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, masks)
