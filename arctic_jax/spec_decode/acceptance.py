"""How far one request's drafts can be trusted, from what came of the last ones. Host only."""

from __future__ import annotations

from dataclasses import dataclass, field

PATIENCE = 8
"""Looks in vain, one a step, until a request looks for drafts only now and then."""
MIN_LENGTH = 4
_OLD = 0.9  # weight of all that was learned before, at each draft
_PRIOR = 2.0  # tokens: weight of what others have come to
_MOST_TRUST = 2.0
# Of the balance, in tokens.
_BEGIN, _SHARE, _MOST = 0.5, 0.005, 8.0
_OF_MISSED = 0.5


@dataclass
class Trust:
    """Accepted tokens for each one that the drafter expected, of late.

    Attributes:
        accepted: tokens that were right, older ones with less weight.
        expected: how many should have been.
    """

    accepted: float = 0.0
    expected: float = 0.0

    def add(self, accepted: float, expected: float, old: float = _OLD) -> None:
        """Learn from one draft."""
        self.accepted = old * self.accepted + accepted
        self.expected = old * self.expected + expected

    def value(self, prior: float = 1.0) -> float:
        """Return it; with little to go by it is near `prior`."""
        ratio = (self.accepted + _PRIOR * prior) / (self.expected + _PRIOR)
        return min(ratio, _MOST_TRUST)


@dataclass
class Acceptance:
    """One request's.

    Attributes:
        max_length: most tokens of any draft.
        length: of the next draft at most; doubled after one that was right, shortened to what would
            have been right after another (the rule of Arctic Inference's asynchronous scheduler),
            but not below `MIN_LENGTH`: shorter ones do not pay. A tree was right if the accepted
            tokens end at a leaf.
        trust: in its drafts, those included that no step verified.
        patience: looks in vain that are left.
        balance: tokens that its drafts may still lose: what they have gained, and a small share of
            its tokens. It does not become slower by more than that, whatever they promise.
    """

    max_length: int
    length: int = field(init=False)
    trust: Trust = field(default_factory=Trust)
    patience: int = PATIENCE
    balance: float = _BEGIN

    def __post_init__(self) -> None:
        self.length = self.max_length

    def learn(
        self, drafted: int, expected: float, accepted: int, needed: int | None = None
    ) -> None:
        """Learn from a draft of `drafted` tokens, of which `expected` should have been accepted.

        `needed` of them had to be drafted for that; by default as many as were accepted.
        """
        needed = accepted if needed is None else needed
        self.length = 2 * self.length if needed == drafted else max(needed + 1, MIN_LENGTH)
        self.length = min(self.length, self.max_length)
        self.trust.add(accepted, expected)

    def has_found(self, worth: bool) -> None:
        """Learn whether a look for a draft found one that is worth its step."""
        self.patience = PATIENCE if worth else max(self.patience - 1, 0)

    def earn(self, num_tokens: int) -> None:
        """Add to the balance for so many new tokens."""
        self.book(_SHARE * num_tokens)

    def book(self, gained: float) -> None:
        """Add to the balance the tokens that a draft has gained, or lost."""
        self.balance = min(self.balance + gained, _MOST)

    def book_missed(self, gained: float) -> None:
        """Book what a draft would have gained, or lost, that the balance did not allow.

        So a debt does not last once drafts have become good; more than at first is not given.
        """
        if self.balance < _BEGIN:
            gained *= _OF_MISSED if gained > 0 else 1.0
            self.balance = min(self.balance + gained, _BEGIN)
