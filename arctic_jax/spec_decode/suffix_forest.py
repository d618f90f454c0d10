"""A `Forest` that grows: makes room, checks and converts arguments, calls what is compiled.

Owned by a `SuffixTree` or a `SuffixDecodingCache`. It belongs to one thread: a call changes shared
arrays in several steps, and nothing locks them.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from arctic_jax.spec_decode import suffix_kernels as kernels

IntArray = np.ndarray[Any, np.dtype[np.int32]]
TokenIds = Sequence[int] | IntArray

_POOLS = ("node", "group", "page", "sequence")
_MIN_PAGE_SIZE = 32
_MIN_NODES = 1024
_MAX_ROWS = 2**31


@dataclass(slots=True)
class SuffixDecodingDraft:
    """Tokens that may come next.

    Attributes:
        token_ids: a path, or a tree in which each token follows its parent.
        parents: for each token the index of the one it follows; -1 for the end of the context.
        probs: for each token an estimate of the probability that it comes.
        score: their sum, an estimate of how many will be accepted.
        match_len: how many tokens at the end of the context were found in a tree.
    """

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    score: float = 0.0
    match_len: int = 0


class Query(NamedTuple):
    """Where to look for the continuation of a context. 0 stands for no sequence and no tree.

    Attributes:
        max_spec_tokens: most tokens of the draft.
        local_root: a tree, which wins when the drafts of both have one score.
        local: a sequence of it that may end like the context.
        shared_root: another tree.
        shared: a sequence of that.
    """

    max_spec_tokens: int
    local_root: int
    local: int = 0
    shared_root: int = 0
    shared: int = 0


class SuffixForest:
    """Suffix trees of token sequences, in arrays that all of them share."""

    def __init__(self, max_depth: int) -> None:
        if max_depth < 1:
            raise ValueError(f"a suffix tree is at least 1 token deep, not {max_depth}")
        compile_kernels()
        self._set(_planted(max_depth))
        self._outputs = _outputs(1, max_depth)

    @property
    def max_depth(self) -> int:
        """Tokens of the longest suffix."""
        return self.arrays.max_depth

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays. Doubled ahead of need; the system lends pages as they are used."""
        return sum(pool.nbytes for pool in self.arrays if isinstance(pool, np.ndarray))

    def new_root(self) -> int:
        """Plant a tree."""
        if self._used("node") + 1 >= len(self.arrays.nodes):
            self._grow_nodes()
        return kernels.new_root(self._addresses)

    def new_sequence(self, root: int) -> int:
        """Begin an empty sequence in a tree."""
        if self._used("sequence") + 1 >= len(self.arrays.sequences):
            self._set(self.arrays._replace(sequences=_doubled(self.arrays.sequences)))
        return kernels.new_sequence(self._addresses, root)

    def extend(self, tokens: IntArray, spans: Sequence[tuple[int, int, int]]) -> None:
        """Append `tokens[begin:end]` for each (sequence, begin, end)."""
        rest = np.array(spans, np.int64)
        while not kernels.extend(self._addresses, tokens, rest):
            if self._used("node") + self.max_depth >= len(self.arrays.nodes):
                self._grow_nodes()
            else:
                self._grow_pages()

    def remove(self, sequence: int) -> None:
        """Take a sequence out of its tree, which has others."""
        kernels.remove(self._addresses, sequence)

    def fell(self, sequence: int) -> None:
        """Take away the only sequence of a tree, and the tree."""
        kernels.fell(self._addresses, sequence)

    def speculate(
        self,
        contexts: Sequence[TokenIds],
        queries: Sequence[Query],
        factor: float,
        offset: float,
        min_prob: float,
        tree: bool,
    ) -> list[SuffixDecodingDraft]:
        """Draft for each context: after m matched tokens at most m · factor + offset tokens.

        Raises:
            ValueError: factor or offset is not finite, or a context not what `as_tokens` takes.
        """
        if not (math.isfinite(factor) and math.isfinite(offset)):
            raise ValueError(f"factor {factor} and offset {offset} must be finite")
        if not contexts:
            return []
        depth, rows = self.arrays.max_depth, []
        ends = np.empty((len(contexts), depth), np.int32)
        for i, context in enumerate(contexts):
            tail = last_tokens(context, depth)
            ends[i, depth - len(tail) :] = tail
            rows.append((len(tail), *queries[i]))
        longest = self._longest_draft([query[0] for query in queries], factor, offset, tree)
        out = self._outputs_of(len(contexts), longest)
        kernels.speculate(
            self._addresses,
            ends,
            np.array(rows, np.int64),
            float(factor),
            float(offset),
            float(min_prob),
            bool(tree),
            *out,
        )
        token_ids, parents, probs, drafts = out
        return [
            SuffixDecodingDraft(
                token_ids[i, :count].tolist(),
                parents[i, :count].tolist(),
                probs[i, :count].tolist(),
                score,
                match_len,
            )
            for i, (count, match_len, score) in enumerate(drafts[: len(contexts)].tolist())
        ]

    def _outputs_of(self, batch: int, longest: int) -> kernels.Outputs:
        """Return arrays for so many drafts, those of the last time if they are large enough."""
        have_batch, have_longest = self._outputs.token_ids.shape
        if batch > have_batch or longest > have_longest:
            shape = (max(batch, have_batch), max(longest, have_longest))
            self._outputs = _outputs(*shape)
        return self._outputs

    def _longest_draft(
        self, limits: Sequence[int], factor: float, offset: float, tree: bool
    ) -> int:
        """Most tokens a draft can have: a path is no deeper than its tree."""
        depth = self.arrays.max_depth
        if not tree:
            return depth
        wanted = max(1.0, factor * depth) + max(0.0, offset) + 1
        return max(depth, int(min(max(limits), wanted, depth * self._used("node"))))

    def _used(self, pool: str) -> int:
        return int(self.arrays.pools[f"used_{pool}"][0])

    def _grow_nodes(self) -> None:
        nodes, groups = _doubled(self.arrays.nodes), _doubled(self.arrays.groups)
        table = np.zeros(2 * len(nodes), np.int32)
        self._set(self.arrays._replace(nodes=nodes, groups=groups, table=table))
        kernels.fill_table(self._addresses)

    def _grow_pages(self) -> None:
        tokens, suffixes = _doubled(self.arrays.tokens), _doubled(self.arrays.suffixes)
        pages = _doubled(self.arrays.pages)
        self._set(self.arrays._replace(tokens=tokens, suffixes=suffixes, pages=pages))

    def _set(self, arrays: kernels.Forest) -> None:
        self.arrays = arrays
        self._addresses = arrays.addresses()


def as_tokens(token_ids: TokenIds) -> IntArray:
    """Return token ids as a one-dimensional int32 array that may be written to.

    Raises:
        ValueError: an array of another type, shape or layout, or an id beyond 32 bits.
        TypeError: something else than integers.
    """
    if isinstance(token_ids, np.ndarray):
        _check_array(token_ids)
        return token_ids if token_ids.flags.writeable else token_ids.copy()
    try:
        return np.frombuffer(array("i", token_ids), np.int32)
    except OverflowError as error:
        raise ValueError(f"token ids are 32-bit integers: {error}") from None


def last_tokens(token_ids: TokenIds, count: int) -> IntArray | array[int]:
    """Return at most so many of the last token ids; errors as in `as_tokens`."""
    if isinstance(token_ids, np.ndarray):
        _check_array(token_ids)
        return token_ids[-count:]
    try:
        return array("i", token_ids[-count:])
    except OverflowError as error:
        raise ValueError(f"token ids are 32-bit integers: {error}") from None


def _check_array(tokens: np.ndarray[Any, Any]) -> None:
    if tokens.ndim != 1 or tokens.dtype != np.int32 or not tokens.flags.c_contiguous:
        raise ValueError(
            "an array of token ids must be int32, one-dimensional and contiguous, not "
            f"{tokens.dtype}, shape {tokens.shape}, strides {tokens.strides}"
        )


def _planted(max_depth: int) -> kernels.Forest:
    """Return an empty forest."""
    nodes, pages = max(_MIN_NODES, 1 << (2 * max_depth).bit_length()), 4
    page_bits = (max(max_depth, _MIN_PAGE_SIZE) - 1).bit_length()
    pools = np.zeros(1, kernels.POOLS)
    for pool in _POOLS:
        pools[f"end_{pool}"] = 1  # row 0 stands for nothing
    return kernels.Forest(
        nodes=np.zeros(nodes, kernels.NODE),
        groups=np.zeros(nodes, kernels.GROUP),
        table=np.zeros(2 * nodes, np.int32),  # at most half full
        tokens=np.zeros(pages << (page_bits + 1), np.int32),
        suffixes=np.zeros(pages << page_bits, kernels.SUFFIX),
        pages=np.zeros(pages, kernels.PAGE),
        sequences=np.zeros(4, kernels.SEQUENCE),
        pools=pools,
        max_depth=max_depth,
        page_bits=page_bits,
    )


def _outputs(batch: int, longest: int) -> kernels.Outputs:
    return kernels.Outputs(
        token_ids=np.zeros((batch, longest), np.int32),
        parents=np.zeros((batch, longest), np.int32),
        probs=np.zeros((batch, longest), np.float32),
        drafts=np.zeros(batch, kernels.DRAFT),
    )


def _doubled(pool: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if len(pool) > _MAX_ROWS // 2:
        raise MemoryError(f"a suffix tree's indices end at {_MAX_ROWS}: cache fewer requests")
    larger = np.zeros(2 * len(pool), pool.dtype)
    larger[: len(pool)] = pool
    return larger


@functools.cache
def compile_kernels() -> None:
    """Compile everything, or load it from numba's cache on disk, so that no request waits.

    Seconds the first time after an installation, tenths of a second in later processes.
    """
    arrays = _planted(2)
    forest = arrays.addresses()
    root = kernels.new_root(forest)
    sequences = [kernels.new_sequence(forest, root) for _ in range(2)]
    spans = np.array([(sequence, 0, 2) for sequence in sequences], np.int64)
    kernels.extend(forest, np.zeros(2, np.int32), spans)
    rows, context = np.array([(2, 1, root, 0, 0, 0)], np.int64), np.zeros((1, 2), np.int32)
    kernels.speculate(forest, context, rows, 1.0, 0.0, 0.1, True, *_outputs(1, 2))
    arrays.table[:] = 0
    kernels.fill_table(forest)
    kernels.remove(forest, sequences[0])
    kernels.fell(forest, sequences[1])
