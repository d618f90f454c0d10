"""How much time may go into drafts that have not yet shown that they pay. Host only."""

from __future__ import annotations

SHARE = 0.005
"""Of all steps."""
_BEGIN, _MOST, _MOST_DEBT = 0.5, 4.0, 1.0


class Allowance:
    """Counted in steps without drafts, so that it means the same for every model and GPU.

    Args:
        share_of_gains: of the steps that drafts have saved.
    """

    def __init__(self, share_of_gains: float) -> None:
        self.share_of_gains = share_of_gains
        self.steps = _BEGIN

    def earn(self, steps: float, gained: float) -> None:
        """Add the share of the steps that passed, and of those that drafts have saved."""
        self.steps = min(self.steps + SHARE * steps + self.share_of_gains * gained, _MOST)

    def spend(self, steps: float) -> None:
        """Take off what something cost; a debt of more than a step is forgotten: some pause."""
        self.steps = max(self.steps - steps, -_MOST_DEBT)
