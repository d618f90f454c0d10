"""Suffix decoding: drafts from what a request, and others before it, already said. No model.

`SuffixDecodingCache` is used by the engine's proposer, or on its own; names and results are those
of `arctic_inference.suffix_decoding` (Oliaro et al. 2024, "SuffixDecoding", arXiv 2411.04975;
docs/speculative-decoding.md). A cache belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Hashable, KeysView, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from arctic_jax.spec_decode.suffix_forest import (
    Query,
    SuffixDecodingDraft,
    SuffixForest,
    TokenIds,
    as_tokens,
)

_MAX_CACHED_REQUESTS = 2**31 - 1


class SuffixTree:
    """The suffixes, cut off after `max_depth` tokens, of any number of sequences, with counts."""

    def __init__(self, max_depth: int) -> None:
        self._forest = SuffixForest(max_depth)
        self._root = self._forest.new_root()
        self._sequences: dict[int, int] = {}

    @property
    def num_seqs(self) -> int:
        """Sequences in the tree."""
        return len(self._sequences)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self._forest.nbytes

    def append(self, seq_id: int, token: int) -> None:
        """Append a token to a sequence, which begins with its first one. O(max_depth)."""
        self.extend(seq_id, [token])

    def extend(self, seq_id: int, token_ids: TokenIds) -> None:
        """Append tokens to a sequence, which begins with its first ones; errors as in the cache."""
        tokens = as_tokens(token_ids)
        if seq_id not in self._sequences:
            self._sequences[seq_id] = self._forest.new_sequence(self._root)
        self._forest.extend(tokens, [(self._sequences[seq_id], 0, len(tokens))])

    def remove(self, seq_id: int) -> None:
        """Remove a sequence.

        Raises:
            ValueError: there is none of this id.
        """
        if seq_id not in self._sequences:
            raise ValueError(f"no sequence {seq_id!r} in the tree")
        self._forest.remove(self._sequences.pop(seq_id))

    def speculate(
        self,
        context: TokenIds,
        max_spec_tokens: int | None = None,
        max_spec_factor: float = 1.0,
        max_spec_offset: float = 0.0,
        min_token_prob: float = 0.1,
        use_tree_spec: bool = False,
    ) -> SuffixDecodingDraft:
        """Draft what follows a context; the arguments are those of the cache."""
        limit = _limit(max_spec_tokens, self._forest.max_depth)
        queries = [Query(limit, self._root)]
        return self._forest.speculate(
            [context], queries, max_spec_factor, max_spec_offset, min_token_prob, use_tree_spec
        )[0]


@dataclass(slots=True)
class _Active:
    """A running request: its own tree of one sequence, and its response in the global one."""

    root: int
    sequence: int
    salt: str | None


@dataclass(slots=True)
class _Global:
    """The tree of the responses with one cache salt."""

    root: int
    num_sequences: int = 0


@dataclass(slots=True)
class _Cached:
    """A response in a global tree."""

    sequence: int
    salt: str | None


class SuffixDecodingCache:
    """A tree for each running request's tokens, and a global one of responses.

    The global tree makes drafts for one request out of the responses to others, so that what
    somebody was told can be guessed at from the drafts (or their timing) of somebody else. Requests
    with different `cache_salt`s never share one; `max_cached_requests=0` switches it off.

    Args:
        max_tree_depth: the longest match plus draft, in tokens.
        max_cached_requests: responses in the global trees of all salts together, running ones
            included; the oldest goes first. 0 for no global tree, -1 for no limit.

    Raises:
        ValueError: a depth below 1, or a limit that is not among -1 … 2³¹ - 1.
    """

    def __init__(self, max_tree_depth: int = 64, max_cached_requests: int = -1) -> None:
        if not -1 <= max_cached_requests <= _MAX_CACHED_REQUESTS:
            raise ValueError(
                f"max_cached_requests must be -1, 0 or at most 2^31 - 1, not {max_cached_requests}"
            )
        self._forest = SuffixForest(max_tree_depth)
        self._max_cached_requests = max_cached_requests
        self._active: dict[Hashable, _Active] = {}
        self._cached: dict[Hashable, _Cached] = {}  # the oldest first
        self._globals: dict[str | None, _Global] = {}

    @property
    def max_tree_depth(self) -> int:
        """The longest match plus draft, in tokens."""
        return self._forest.max_depth

    @property
    def max_cached_requests(self) -> int:
        """Most responses in the global trees; -1 for no limit."""
        return self._max_cached_requests

    @property
    def active_requests(self) -> KeysView[Hashable]:
        """Ids of the requests that were started and not stopped."""
        return self._active.keys()

    @property
    def cached_requests(self) -> KeysView[Hashable]:
        """Ids of the requests whose responses are in a global tree, the oldest first."""
        return self._cached.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of all trees, with the room they may grow into."""
        return self._forest.nbytes

    def start_request(
        self, req_id: Hashable, prompt_token_ids: TokenIds, cache_salt: str | None = None
    ) -> None:
        """Begin a request. A response cached under its id is evicted.

        Args:
            req_id: any name that is not in use.
            prompt_token_ids: a sequence of integers, or an int32 array.
            cache_salt: only requests with the same one share a global tree.

        Raises:
            ValueError: the id is in use, or the tokens are not 32-bit (for an array: not int32,
                one-dimensional and contiguous).
            TypeError: tokens that are no integers.
        """
        if req_id in self._active:
            raise ValueError(f"request {req_id!r} is already active")
        tokens = as_tokens(prompt_token_ids)
        if req_id in self._cached:
            self.evict_cached_response(req_id)
        root = self._forest.new_root()
        sequence = self._forest.new_sequence(root)
        self._active[req_id] = _Active(root, sequence, cache_salt)
        self._forest.extend(tokens, [(sequence, 0, len(tokens))])
        if self._max_cached_requests != 0:
            self._cache_response(req_id, cache_salt)

    def add_active_response(self, req_id: Hashable, token_ids: TokenIds) -> None:
        """Append tokens to the response of a running request; errors as in `start_request`."""
        self.add_active_responses({req_id: token_ids})

    def add_active_responses(self, responses: Mapping[Hashable, TokenIds]) -> None:
        """Append the new tokens of a step to the responses of several requests, all or none."""
        spans, chunks, begin = [], [], 0
        for req_id, token_ids in responses.items():
            active = self._active_request(req_id)
            chunks.append(as_tokens(token_ids))
            end = begin + len(chunks[-1])
            spans.append((active.sequence, begin, end))
            cached = self._cached.get(req_id)
            if cached is not None:  # not evicted meanwhile
                spans.append((cached.sequence, begin, end))
            begin = end
        if spans:
            tokens = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
            self._forest.extend(tokens, spans)

    def speculate(
        self,
        req_id: Hashable,
        context: TokenIds,
        max_spec_tokens: int | None = None,
        max_spec_factor: float = 1.0,
        max_spec_offset: float = 0.0,
        min_token_prob: float = 0.1,
        use_tree_spec: bool = False,
    ) -> SuffixDecodingDraft:
        """Draft what follows the end of a running request's tokens.

        Of all suffixes of the context that a tree knows, the one whose continuation has the highest
        score; of two with one score the longer, of two trees the request's own.

        Args:
            req_id: a running request.
            context: all its tokens, or the last `max_tree_depth` of them. At least 2, or the
                draft is empty.
            max_spec_tokens: most tokens of the draft; `None` for `max_tree_depth`.
            max_spec_factor: most tokens of the draft for each token matched ...
            max_spec_offset: ... and beside those.
            min_token_prob: tokens less probable are not drafted.
            use_tree_spec: draft a tree of the most probable tokens, not a path.

        Raises:
            ValueError: the request is not active, a number is not finite, or the tokens are not
                what `start_request` takes.
            TypeError: tokens that are no integers.
        """
        queries = [self._query(req_id, max_spec_tokens)]
        return self._forest.speculate(
            [context], queries, max_spec_factor, max_spec_offset, min_token_prob, use_tree_spec
        )[0]

    def speculate_batch(
        self,
        req_ids: Sequence[Hashable],
        contexts: Sequence[TokenIds],
        max_spec_tokens: Sequence[int] | int | None = None,
        max_spec_factor: float = 1.0,
        max_spec_offset: float = 0.0,
        min_token_prob: float = 0.1,
        use_tree_spec: bool = False,
    ) -> list[SuffixDecodingDraft]:
        """Draft for all requests of a step, in one call of what is compiled.

        As `speculate` for each; `max_spec_tokens` is one for all, or one for each request.

        Raises:
            ValueError: as `speculate`; or the lengths of the arguments differ.
        """
        if isinstance(max_spec_tokens, Sequence):
            limits = list(max_spec_tokens)
        else:
            limits = [max_spec_tokens] * len(req_ids)
        if not len(req_ids) == len(contexts) == len(limits):
            raise ValueError(
                f"{len(contexts)} contexts and {len(limits)} limits for {len(req_ids)} requests"
            )
        queries = list(map(self._query, req_ids, limits))
        return self._forest.speculate(
            contexts, queries, max_spec_factor, max_spec_offset, min_token_prob, use_tree_spec
        )

    def stop_request(self, req_id: Hashable) -> None:
        """End a request. Its response stays cached.

        Raises:
            ValueError: the request is not active.
        """
        self._forest.fell(self._active_request(req_id).sequence)
        del self._active[req_id]

    def evict_cached_response(self, req_id: Hashable) -> None:
        """Take a response out of its global tree; the request, if it runs, goes on without.

        Raises:
            ValueError: there is no cached response of this id.
        """
        if req_id not in self._cached:
            raise ValueError(f"request {req_id!r} is not cached")
        cached = self._cached.pop(req_id)
        tree = self._globals[cached.salt]
        tree.num_sequences -= 1
        if tree.num_sequences:
            self._forest.remove(cached.sequence)
        else:
            self._forest.fell(cached.sequence)
            del self._globals[cached.salt]

    def _active_request(self, req_id: Hashable) -> _Active:
        if req_id not in self._active:
            raise ValueError(f"request {req_id!r} is not active")
        return self._active[req_id]

    def _cache_response(self, req_id: Hashable, salt: str | None) -> None:
        """Begin a response in a global tree; the oldest ones make room for it."""
        if salt not in self._globals:
            self._globals[salt] = _Global(self._forest.new_root())
        tree = self._globals[salt]
        tree.num_sequences += 1
        self._cached[req_id] = _Cached(self._forest.new_sequence(tree.root), salt)
        while len(self._cached) > self._max_cached_requests >= 0:
            self.evict_cached_response(next(iter(self._cached)))

    def _query(self, req_id: Hashable, max_spec_tokens: int | None) -> Query:
        active = self._active_request(req_id)
        tree, cached = self._globals.get(active.salt), self._cached.get(req_id)
        return Query(
            _limit(max_spec_tokens, self._forest.max_depth),
            active.root,
            active.sequence,
            tree.root if tree else 0,
            cached.sequence if cached else 0,
        )


def _limit(max_spec_tokens: int | None, max_depth: int) -> int:
    return max_depth if max_spec_tokens is None else max(0, max_spec_tokens)
