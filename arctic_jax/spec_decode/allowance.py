"""How much time may go into drafts that have not yet shown that they pay. Host only."""

from __future__ import annotations

SHARE = 0.005
"""Of all steps."""
_BEGIN, _MOST = 0.5, 4.0


class Allowance:
    """Counted in steps without drafts, so that it means the same for every model and GPU.

    Args:
        share_of_gains: of the steps that drafts have saved.
        most_debt: steps; a larger debt is forgotten, as some stalls are no cost of drafts.
    """

    def __init__(self, share_of_gains: float, most_debt: float = 1.0) -> None:
        self.share_of_gains, self.most_debt = share_of_gains, most_debt
        self.steps = _BEGIN

    def earn(self, steps: float, gained: float) -> None:
        """Add the share of the steps that passed, and of those that drafts have saved."""
        self.steps = min(self.steps + SHARE * steps + self.share_of_gains * gained, _MOST)

    def spend(self, steps: float) -> None:
        """Take off what something cost."""
        self.steps = max(self.steps - steps, -self.most_debt)
