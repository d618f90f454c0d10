"""Drafts from suffix trees: what the request and others before it said. Host only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from arctic_jax.request import Request
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.host_proposer import HostProposer
from arctic_jax.spec_decode.suffix_decoding import SuffixDecodingCache
from arctic_jax.speculative_config import SpeculativeConfig


class SuffixProposer(HostProposer):
    """Suffix decoding (Oliaro et al. 2024, arXiv 2411.04975), with a `SuffixDecodingCache`.

    Paths, or trees if the user wants them.

    Requests with different `cache_salt`s never see each other's responses.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        super().__init__(config)
        self.cache = SuffixDecodingCache(
            config.suffix_cache_max_depth, config.suffix_cache_max_requests
        )
        self._ids: dict[Request, int] = {}  # a user may use a request's id again
        self._counter = itertools.count()

    def start(self, request: Request) -> None:
        """See `HostProposer`."""
        self._ids[request] = next(self._counter)
        self.cache.start_request(
            self._ids[request], request.prompt_token_ids, cache_salt=request.cache_salt
        )

    def observe(self, tokens: Mapping[Request, Sequence[int]]) -> None:
        """See `HostProposer`."""
        self.cache.add_active_responses({self._ids[r]: new for r, new in tokens.items()})

    def drafts(self, requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        """See `HostProposer`."""
        found = self.cache.speculate_batch(
            [self._ids[request] for request in requests],
            [request.known_tail(self.cache.max_tree_depth) for request in requests],
            list(limits),
            self.config.suffix_max_spec_factor,
            self.config.suffix_max_spec_offset,
            self.config.suffix_min_token_prob,
            self.config.suffix_use_tree_spec,
        )
        if self.config.suffix_use_tree_spec:
            return [Draft.of_tree(d.token_ids, d.parents, d.probs, d.score) for d in found]
        return [Draft(draft.token_ids, draft.probs, draft.score) for draft in found]

    def stop(self, request: Request) -> None:
        """See `HostProposer`."""
        self.cache.stop_request(self._ids.pop(request))

    def remember(self, request: Request) -> None:
        """See `HostProposer`."""
        if self.config.suffix_cache_max_requests != 0:
            name = next(self._counter)
            self.cache.start_request(name, [], cache_salt=request.cache_salt)
            self.cache.add_active_response(name, request.output_token_ids)
            self.cache.stop_request(name)
