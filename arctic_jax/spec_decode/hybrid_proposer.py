"""Suffix decoding where it is sure of itself, a network's drafts elsewhere. Host only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arctic_jax.request import Request
from arctic_jax.spec_decode.device_proposer import DeviceProposer
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.suffix_proposer import SuffixProposer
from arctic_jax.speculative_config import SpeculativeConfig


class HybridProposer(DeviceProposer):
    """Arctic Inference's rule: a suffix draft, if its score reaches the speculator's length.

    The score is how many of its tokens should be accepted, and the speculator cannot have more than
    its length accepted. The soft cut-off is the speculator's alone.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        super().__init__(config)
        self.suffix = SuffixProposer(config)

    def start(self, request: Request) -> None:
        """See `HostProposer`."""
        self.suffix.start(request)

    def observe(self, tokens: Mapping[Request, Sequence[int]]) -> None:
        """See `HostProposer`."""
        self.suffix.observe(tokens)

    def stop(self, request: Request) -> None:
        """See `HostProposer`."""
        self.suffix.stop(request)

    def remember(self, request: Request) -> None:
        """See `HostProposer`."""
        self.suffix.remember(request)

    def drafts(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        """See `HostProposer`."""
        by_suffix = self.suffix.drafts(requests, limits)
        by_speculator = super().drafts(requests, limits)
        return [
            long if long.score >= self.config.num_drafted_on_device else short
            for long, short in zip(by_suffix, by_speculator, strict=True)
        ]

    def _within_cut_offs(self, requests: Sequence[Request]) -> Sequence[Request]:
        return [] if self.hard_disabled else requests
