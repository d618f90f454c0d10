"""Drafting from what a request has read and said, within the step. Pure; no weights.

Where the last tokens came before in the same request, what followed them there is the draft: suffix
decoding (Oliaro et al. 2024, arXiv 2411.04975) without the trees. A suffix tree is for one thread
that follows pointers; a GPU compares the last tokens with every place at once. What it buys is that
the draft is on the device when the next step begins, so that nobody waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from arctic_jax.engine.drafting import Drafting, Drawn
from arctic_jax.kv_cache import KVCaches, ModelCacheSpec, TokenCacheSpec
from arctic_jax.shift_parallel import MeshLayout
from arctic_jax.weights import Source

MAX_MATCH_LEN = 32
"""Tokens of the longest match that is told from a longer one."""


class NoWeights(nnx.Module):
    """What a drafter without parameters has for a network."""

    def weight_sources(self) -> dict[str, Source]:
        """See `weight_loading.Module`."""
        return {}


@dataclass(frozen=True)
class SuffixMatching(Drafting):
    """Drafts what followed the longest, and of those the last, match of a request's last tokens.

    Attributes:
        max_spec_factor: most drafted tokens for each token matched ...
        max_spec_offset: ... and beside those.
    """

    max_spec_factor: float = 1.0
    max_spec_offset: float = 0.0

    def module(self, num_shards: int, implementation: str | None) -> NoWeights:
        """See `Drafting`."""
        del num_shards, implementation
        return NoWeights()

    def caches(self) -> tuple[TokenCacheSpec, ...]:
        """See `Drafting`."""
        return (TokenCacheSpec(),)

    def follow(self, network: Any, drawn: Drawn, caches: KVCaches) -> KVCaches:
        """See `Drafting`."""
        del network
        (cache,) = caches
        return (cache.written(drawn.batch.slot_mapping, drawn.batch.token_ids),)

    def draft(
        self, network: Callable[[], Any], drawn: Drawn, caches: KVCaches
    ) -> tuple[Array, KVCaches]:
        """See `Drafting`; -1 after the end of a draft."""
        del network
        (cache,) = caches
        batch = drawn.batch
        last, draws = drawn.last_rows(self.max_num_seqs)
        tables = batch.block_tables[: len(last)]
        texts = cache.ids[tables].reshape(len(last), -1)
        ends = drawn.positions(last) + 1
        drafts = self.continuations(texts, ends, drawn.output.token_ids[last])
        return jnp.where(draws[:, None], drafts, -1), (cache,)

    def continuations(self, texts: Array, ends: Array, tokens: Array) -> Array:
        """Say how texts may go on.

        Args:
            texts: `[D, L]` token ids, of which the first `ends [D]` are the text's.
            ends: see above.
            tokens: `[D]` the token that comes next, after which is to be drafted.

        Returns:
            `[D, K]`, -1 after the end of a draft.
        """
        count, length = texts.shape
        row = jnp.arange(count)
        place = jnp.arange(length)
        # The texts with what was drawn. Texts fill the table only if that is the last token.
        texts = texts.at[row, ends].set(tokens, mode="drop")
        same = place < ends[:, None]  # a match ends before what it is to be a match of
        matched = jnp.zeros(texts.shape, jnp.int32)
        for back in range(MAX_MATCH_LEN):
            wanted = texts[row, jnp.maximum(ends - back, 0)]
            before = jnp.pad(texts, ((0, 0), (back, 0)))[:, :length]
            same &= (before == wanted[:, None]) & (place >= back)
            matched += same
        # The longest, and of those the last: both in one number.
        best = (matched * length + place).argmax(1)
        longest = matched[row, best]
        period = jnp.maximum(ends - best, 1)  # what reaches the end goes round
        ahead = jnp.arange(self.num_tokens)
        draft = texts[row[:, None], best[:, None] + 1 + ahead % period[:, None]]
        allowed = self.max_spec_factor * longest + self.max_spec_offset
        allowed = jnp.where(longest > 0, jnp.floor(allowed + 1e-6), 0)
        return jnp.where(ahead < allowed[:, None], draft, -1)


@dataclass(frozen=True)
class HybridDrafting(Drafting):
    """A match's draft, if it is as long as the other drafter's, else the other's.

    Arctic Inference's rule with a match's length as its score.

    Attributes:
        matching: the one.
        other: a speculator or a draft model.
    """

    matching: SuffixMatching
    other: Drafting

    @property
    def layout(self) -> MeshLayout | None:
        """See `Drafting`."""
        return self.other.layout

    def module(self, num_shards: int, implementation: str | None) -> Any:
        """See `Drafting`."""
        return self.other.module(num_shards, implementation)

    def caches(self) -> tuple[ModelCacheSpec | TokenCacheSpec, ...]:
        """See `Drafting`."""
        return (*self.matching.caches(), *self.other.caches())

    def follow(self, network: Any, drawn: Drawn, caches: KVCaches) -> KVCaches:
        """See `Drafting`."""
        tokens, *others = caches
        matched = self.matching.follow(None, drawn, (tokens,))
        return (*matched, *self.other.follow(network, drawn, tuple(others)))

    def draft(
        self, network: Callable[[], Any], drawn: Drawn, caches: KVCaches
    ) -> tuple[Array, KVCaches]:
        """See `Drafting`."""
        tokens, *others = caches
        long, matched = self.matching.draft(network, drawn, (tokens,))
        short, others = self.other.draft(network, drawn, tuple(others))
        is_long = long[:, self.other.num_tokens - 1] >= 0
        padding = ((0, 0), (0, self.num_tokens - self.other.num_tokens))
        short = jnp.pad(short, padding, constant_values=-1)
        return jnp.where(is_long[:, None], long, short), (*matched, *others)
