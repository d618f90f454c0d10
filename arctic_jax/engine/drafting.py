"""What drafts within a step: a speculator, or a draft model with a cache of its own.

Pure, and runs inside the step program, after the tokens were drawn. Its drafts come to the host
with the step's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from arctic_jax.batch import ForwardBatch, StepOutput
from arctic_jax.config import ModelConfig
from arctic_jax.kv_cache import KVCache, KVCaches, ModelCacheSpec, TokenCacheSpec
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.models.speculator import Speculator, SpeculatorConfig, Vocabulary
from arctic_jax.shift_parallel import ALONE, MeshLayout


@dataclass(frozen=True)
class Drawn:
    """What a step computed and drew: all that is known when drafting begins.

    Attributes:
        model: the one that drew.
        batch: of the step.
        hidden: `[R, hidden]` what the logits were made of.
        output: what was drawn.
        layout: of the step.
    """

    model: LlamaForCausalLM
    batch: ForwardBatch
    hidden: Array
    output: StepOutput
    layout: MeshLayout

    def last_rows(self, most: int) -> tuple[Array, Array]:
        """Return the row that drew the last token of each of the first sequences, `[D]`.

        And whether any did: of a sequence that drew nothing the row is any.
        """
        num_seqs = self.batch.seq_lens.shape[0]
        draws = (self.batch.row_target < 0) & (self.output.token_ids >= 0)
        rows = jnp.where(draws, jnp.arange(len(self.hidden)), -1)
        last = jnp.full(num_seqs, -1).at[self.batch.row_seq].max(rows)[:most]
        return jnp.maximum(last, 0), last >= 0

    def positions(self, rows: Array) -> Array:
        """Return the positions of the tokens that rows of logits belong to."""
        return self.batch.positions[jnp.maximum(self.batch.logit_rows[rows], 0)]


@dataclass(frozen=True)
class Drafting:
    """How a step drafts for the next one. A part of the program's key; subclasses say how.

    Attributes:
        num_tokens: K, of a draft.
        max_num_seqs: only the first so many sequences of a step get one.
    """

    num_tokens: int
    max_num_seqs: int

    @property
    def layout(self) -> MeshLayout | None:
        """In which the network's weights lie; `None` for that of the step."""
        return None

    def module(self, num_shards: int, implementation: str | None) -> Any:
        """Return the network without its parameters."""
        raise NotImplementedError

    def caches(self) -> tuple[ModelCacheSpec | TokenCacheSpec, ...]:
        """Return the caches that it has beside the model's."""
        raise NotImplementedError

    def follow(self, network: Any, drawn: Drawn, caches: KVCaches) -> KVCaches:
        """Put the step's tokens into the drafter's own caches; in every step.

        Args:
            network: `module` with its parameters.
            drawn: what is known.
            caches: its own.
        """
        raise NotImplementedError

    def draft(
        self, network: Callable[[], Any], drawn: Drawn, caches: KVCaches
    ) -> tuple[Array, KVCaches]:
        """Draft after the last token that was drawn for each of the first sequences.

        In the steps that shall, after `follow`.

        Args:
            network: makes what `follow` gets, to be called within a loop that needs it: a loop is
                given copies of those of its arguments that are parts of an array, as weights are.
            drawn: what is known.
            caches: its own.

        Returns:
            `[D, K]`, a row each sequence, -1 after a shorter draft; of one that drew nothing,
            anything. And the caches.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SpeculatorDrafting(Drafting):
    """By a speculator, which starts from the model's hidden states.

    Attributes:
        speculator_class, config: what it is made of.
    """

    speculator_class: type[Speculator]
    config: SpeculatorConfig

    def module(self, num_shards: int, implementation: str | None) -> Speculator:
        """See `Drafting`."""
        del implementation
        return nnx.eval_shape(lambda: self.speculator_class(self.config, num_shards))

    def caches(self) -> tuple[ModelCacheSpec, ...]:
        """See `Drafting`."""
        return ()

    def follow(self, network: Speculator, drawn: Drawn, caches: KVCaches) -> KVCaches:
        """See `Drafting`; all it starts from are the step's hidden states."""
        del network, drawn
        return caches

    def draft(
        self, network: Callable[[], Speculator], drawn: Drawn, caches: KVCaches
    ) -> tuple[Array, KVCaches]:
        """See `Drafting`."""
        last, _ = drawn.last_rows(self.max_num_seqs)
        vocabulary = Vocabulary(drawn.model.embed, drawn.model.head)
        hidden, tokens = drawn.hidden[last], drawn.output.token_ids[last]
        return network()(hidden, tokens, vocabulary, drawn.layout, self.num_tokens), caches


@dataclass(frozen=True)
class ModelDrafting(Drafting):
    """By a smaller language model: it reads what the model reads, and says K tokens more.

    Each device has all of it and works alone: at the size of a draft model the weights are read
    faster than devices agree, and its heads need not be divisible. Its layers of the cache have the
    blocks of the model's, so prefixes are shared and requests preempted as if it was not there.

    Attributes:
        model_class, config: what it is made of.
        block_size: of the cache.
    """

    model_class: type[LlamaForCausalLM]
    config: ModelConfig
    block_size: int

    @property
    def layout(self) -> MeshLayout:
        """See `Drafting`."""
        return ALONE

    def module(self, num_shards: int, implementation: str | None) -> LlamaForCausalLM:
        """See `Drafting`."""
        del num_shards
        return nnx.eval_shape(lambda: self.model_class(self.config, 1, implementation))

    def caches(self) -> tuple[ModelCacheSpec, ...]:
        """See `Drafting`."""
        config = self.config
        heads = config.num_key_value_heads
        return (ModelCacheSpec(config.num_cache_layers, heads, config.head_dim, PartitionSpec()),)

    def follow(self, network: LlamaForCausalLM, drawn: Drawn, caches: KVCaches) -> KVCaches:
        """See `Drafting`."""
        (cache,) = caches
        # Every token of the step, drafted or not: what is in the blocks is complete and right.
        _, cache = network.hidden_states(drawn.batch, cache, ALONE)
        return (cache,)

    def draft(
        self, network: Callable[[], LlamaForCausalLM], drawn: Drawn, caches: KVCaches
    ) -> tuple[Array, KVCaches]:
        """See `Drafting`."""
        (cache,) = caches
        last, draws = drawn.last_rows(self.max_num_seqs)
        after = drawn.positions(last)

        def step(state: tuple[Array, KVCache], ahead: Array) -> tuple[tuple[Array, KVCache], Array]:
            tokens, cache = state
            batch = self._one_token_each(drawn.batch, tokens, after + ahead, draws)
            model = network()
            hidden, cache = model.hidden_states(batch, cache, ALONE)
            tokens = model.head.likeliest(hidden, ALONE)
            return (tokens, cache), tokens

        ahead = jnp.arange(1, self.num_tokens + 1)
        (_, cache), drafts = jax.lax.scan(step, (drawn.output.token_ids[last], cache), ahead)
        return drafts.T, (cache,)

    def _one_token_each(
        self, batch: ForwardBatch, tokens: Array, positions: Array, draws: Array
    ) -> ForwardBatch:
        """The first sequences with one token each, after those of `batch`.

        A position beyond the sequence's last block is not written and not seen, which makes that
        draft worse; the request gets its next block with the next step.
        """
        count, size = len(tokens), self.block_size
        seq_lens, tables = batch.seq_lens[:count], batch.block_tables[:count]
        room = -(-seq_lens // size) * size
        block = jnp.minimum(positions // size, tables.shape[1] - 1)
        slots = jnp.take_along_axis(tables, block[:, None], axis=1)[:, 0] * size + positions % size
        num_seqs = (seq_lens > 0).sum()
        index = jnp.arange(count)
        return replace(
            batch,
            token_ids=tokens,
            positions=positions,
            slot_mapping=jnp.where(draws & (positions < room), slots, -1),
            query_start_loc=jnp.minimum(jnp.arange(count + 1), num_seqs),
            seq_lens=jnp.where(draws, jnp.minimum(positions + 1, room), seq_lens),
            block_tables=tables,
            logit_rows=jnp.where(index < num_seqs, index, -1),
            row_seq=index,
            max_query_len=1,
        )
