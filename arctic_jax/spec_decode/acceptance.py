"""How far one request's drafts can be trusted, from what came of the last ones. Host only."""

from __future__ import annotations

from dataclasses import dataclass, field

MIN_GAIN = 0.5
"""Accepted tokens that a draft must promise. A request with a draft waits for its last tokens to be
known, which costs it up to a step of the host's time, or one of the requests beside it."""
_NEW, _RECOVERY = 0.25, 0.02


@dataclass
class Acceptance:
    """One request's.

    Attributes:
        max_length: most tokens of any draft.
        length: of the next draft at most; doubled after one that was right, shortened to what would
            have been right after another (the rule of Arctic Inference's asynchronous scheduler).
            A tree was right if the accepted tokens end at a leaf.
        trust: accepted tokens for each one that the drafter expected, of late; 1 at first.
    """

    max_length: int
    length: int = field(init=False)
    trust: float = 1.0

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
        if expected > 0:
            self.trust += _NEW * (min(accepted / expected, 1.0) - self.trust)

    def allows(self, gain: float) -> bool:
        """Whether a draft that promises so many tokens is worth its step.

        Each refusal raises the trust a little, so that a request whose drafts were wrong tries
        again after some tokens.
        """
        if self.trust * gain >= MIN_GAIN:
            return True
        if gain >= MIN_GAIN:
            self.trust += _RECOVERY * (1 - self.trust)
        return False
