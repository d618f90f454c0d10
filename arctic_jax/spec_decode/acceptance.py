"""How far one request's drafts can be trusted, from what came of the last ones. Host only."""

from __future__ import annotations

from dataclasses import dataclass, field

PATIENCE, MOST_PATIENCE = 16, 512
"""Drafts that are refused before one is tried."""
_NEW = 0.25


@dataclass
class Acceptance:
    """One request's.

    Attributes:
        max_length: most tokens of any draft.
        length: of the next draft at most; doubled after one that was right, shortened to what would
            have been right after another (the rule of Arctic Inference's asynchronous scheduler).
            A tree was right if the accepted tokens end at a leaf.
        trust: accepted tokens for each one that the drafter expected, of late.
        patience: drafts to refuse before the next trial.
        num_refused: of those.
        is_trial: whether the last draft that was allowed is one.
        least: accepted tokens that it must have to be no loss.
    """

    max_length: int
    length: int = field(init=False)
    trust: float = 1.0
    patience: int = PATIENCE
    num_refused: int = 0
    is_trial: bool = False
    least: float = 0.0

    def __post_init__(self) -> None:
        self.length = self.max_length

    def verified(
        self, drafted: int, expected: float, accepted: int, needed: int | None = None
    ) -> None:
        """Learn from a draft of `drafted` tokens, of which `expected` should have been accepted.

        `needed` of them had to be drafted for that; by default as many as were accepted.
        """
        needed = accepted if needed is None else needed
        self.length = 2 * self.length if needed == drafted else needed + 1
        self.length = min(self.length, self.max_length)
        right = min(accepted / expected, 1.0) if expected > 0 else self.trust
        self.trust += _NEW * (right - self.trust)
        if self.is_trial:
            self.is_trial = False
            if accepted >= self.least:
                self.trust, self.patience = max(self.trust, right), PATIENCE
            else:
                self.patience = min(2 * self.patience, MOST_PATIENCE)

    def allows(self, gain: float, least: float) -> bool:
        """Whether a draft that promises so many tokens is worth its step, which costs `least`.

        Of those that are not, one is tried after a while; after each that is no success, a while
        twice as long.
        """
        if self.trust * gain < least:
            self.num_refused += gain >= least
            if self.num_refused < self.patience:
                return False
            self.num_refused = 0
            self.is_trial = True
        self.least = least
        return True
