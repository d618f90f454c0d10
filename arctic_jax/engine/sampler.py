"""From logits to tokens. Pure; runs inside the step program.

Nothing is sorted: the bounds of top-k and top-p are found bit by bit on the order-preserving
integer image of the logits, which is exact. Draws use the Gumbel-max trick with a key made from the
request's seed and the number of tokens it has drawn, so a request's text does not depend on what
else is in the batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from arctic_jax.batch import ForwardBatch, StepOutput

IN_PROMPT = 1 << 30
"""Flag in `SamplerState.seen`; the bits below count the token's occurrences in the output."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["seen", "bias"], meta_fields=[])
@dataclass(frozen=True)
class SamplerState:
    """What penalties and biases need to know of each running request, on the device.

    Only the rows of requests whose parameters adjust logits are ever read.

    Attributes:
        seen: `[max_num_seqs, vocab]` int32, see `IN_PROMPT`.
        bias: `[max_num_seqs, vocab]` float32, added to the logits; -inf forbids a token.
    """

    seen: Array
    bias: Array

    @staticmethod
    def zeros(max_num_seqs: int, vocab_size: int) -> SamplerState:
        """Make the state of an engine without requests."""
        shape = (max_num_seqs, vocab_size)
        return SamplerState(seen=jnp.zeros(shape, jnp.int32), bias=jnp.zeros(shape, jnp.float32))

    @staticmethod
    def bytes(max_num_seqs: int, vocab_size: int) -> int:
        """Memory of the state, on each device."""
        return 8 * max_num_seqs * vocab_size


def set_row(state: SamplerState, row: Array, seen: Array, bias: Array) -> SamplerState:
    """Replace one request's row: `seen [vocab]`, `bias [vocab]`."""
    return SamplerState(seen=state.seen.at[row].set(seen), bias=state.bias.at[row].set(bias))


def sample(
    logits: Array, batch: ForwardBatch, state: SamplerState, max_logprobs: int
) -> tuple[StepOutput, SamplerState]:
    """Draw a token for each row of `logits [R, vocab]` (float32), and report log-probabilities.

    The order is vLLM's: penalties, biases, temperature, min-p, top-k, top-p. Log-probabilities are
    those of the model, before any of it.
    """
    state_row = batch.state_row[batch.row_seq]
    adjusted = lax.cond(
        jnp.any(state_row >= 0),
        lambda: _adjust(logits, batch, state, state_row),
        lambda: logits,
    )
    temperature = batch.temperature[batch.row_seq]
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    tokens = lax.cond(
        jnp.any(temperature > 0),
        lambda: jnp.where(temperature > 0, _draw(adjusted, batch, temperature), greedy),
        lambda: greedy,
    )
    # Rows of prompt positions, of padding and without state fall outside and are dropped.
    counted = jnp.where((state_row >= 0) & (batch.row_target < 0), state_row, state.seen.shape[0])
    seen = state.seen.at[counted, tokens].add(1, mode="drop")
    target = jnp.where(batch.row_target >= 0, batch.row_target, tokens)
    report = lax.cond(
        batch.want_logprobs > 0,
        lambda: _logprobs(logits, target, max_logprobs),
        lambda: _no_logprobs(logits.shape[0], max_logprobs),
    )
    # Penalties may overflow, and biases may forbid every token. Rows of prompt positions draw none.
    drawn = jnp.isfinite(adjusted.max(axis=-1)) | (batch.row_target >= 0)
    output = StepOutput(tokens, jnp.isfinite(logits).all(axis=-1) & drawn, *report)
    return output, SamplerState(seen=seen, bias=state.bias)


def most_likely(logits: Array, max_logprobs: int) -> StepOutput:
    """Take the likeliest token of each row of `logits [R, vocab]` and report nothing of it."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    report = _no_logprobs(logits.shape[0], max_logprobs)
    return StepOutput(tokens, jnp.isfinite(logits).all(axis=-1), *report)


def _adjust(logits: Array, batch: ForwardBatch, state: SamplerState, state_row: Array) -> Array:
    """Apply penalties and biases to the rows that have state."""
    seq = batch.row_seq
    row = jnp.maximum(state_row, 0)
    seen = state.seen[row]
    count = (seen & (IN_PROMPT - 1)).astype(jnp.float32)
    repetition = jnp.where(seen > 0, batch.repetition_penalty[seq][:, None], 1.0)
    x = jnp.where(logits > 0, logits / repetition, logits * repetition)
    x = x - batch.frequency_penalty[seq][:, None] * count
    x = x - batch.presence_penalty[seq][:, None] * (count > 0)
    return jnp.where((state_row >= 0)[:, None], x + state.bias[row], logits)


def _draw(logits: Array, batch: ForwardBatch, temperature: Array) -> Array:
    """Draw a token for each row after temperature, min-p, top-k and top-p."""
    seq = batch.row_seq
    # Below the highest, so that a tiny temperature cannot make infinities of several tokens.
    x = logits - logits.max(axis=-1, keepdims=True)
    x = x / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    min_p, top_k, top_p = (p[seq] for p in (batch.min_p, batch.top_k, batch.top_p))
    x = jnp.where(x < jnp.log(min_p)[:, None], -jnp.inf, x)  # log 0 keeps everything

    def keep_top_k(x: Array) -> Array:
        needed = jnp.where(top_k > 0, top_k, x.shape[1]).astype(jnp.float32)
        return _keep_largest(x, jnp.ones_like(x), needed)

    def keep_top_p(x: Array) -> Array:
        weights = jnp.exp(x)
        # Everything is kept for top_p = 1, whatever the rounding of the sum.
        needed = jnp.where(top_p < 1, top_p * weights.sum(axis=-1), 0.0)
        return _keep_largest(x, weights, needed, all_rows=top_p >= 1)

    x = lax.cond(jnp.any(top_k > 0), keep_top_k, lambda x: x, x)
    x = lax.cond(jnp.any(top_p < 1), keep_top_p, lambda x: x, x)
    seeds = lax.bitcast_convert_type(batch.seed[seq], jnp.uint32)
    keys = jax.random.wrap_key_data(seeds, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, batch.row_step)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, x.shape[1:], jnp.float32))(keys)
    return jnp.argmax(x + noise, axis=-1).astype(jnp.int32)


def _keep_largest(x: Array, weights: Array, needed: Array, all_rows: Array | None = None) -> Array:
    """Keep the fewest largest entries of each row whose weights sum to `needed`; -inf elsewhere.

    Entries equal to the smallest one kept are kept too. Rows in `all_rows` keep everything.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # Floats order like these integers: negative ones reversed, below the positive ones.
    order = jnp.where(bits >> 31 > 0, ~bits, bits | jnp.uint32(1 << 31))

    def next_bit(i: Array, bound: Array) -> Array:
        candidate = bound | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        mass = jnp.sum(jnp.where(order >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(mass >= needed, candidate, bound)

    bound = lax.fori_loop(0, 32, next_bit, jnp.zeros(x.shape[0], jnp.uint32))
    if all_rows is not None:
        bound = jnp.where(all_rows, 0, bound)
    return jnp.where(order >= bound[:, None], x, -jnp.inf)


def _logprobs(logits: Array, target: Array, max_logprobs: int) -> tuple[Array, Array, Array, Array]:
    """Log-probability and rank of each row's target, and the `max_logprobs` largest."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, target[:, None], axis=-1)
    rank = (logprobs > chosen).sum(axis=-1).astype(jnp.int32) + 1
    top, ids = lax.top_k(logprobs, min(max_logprobs, logits.shape[1]))
    pad = ((0, 0), (0, max_logprobs - top.shape[1]))
    return chosen[:, 0], rank, jnp.pad(ids.astype(jnp.int32), pad), jnp.pad(top, pad)


def _no_logprobs(rows: int, max_logprobs: int) -> tuple[Array, Array, Array, Array]:
    zeros, table = jnp.zeros(rows), jnp.zeros((rows, max_logprobs))
    return zeros, zeros.astype(jnp.int32), table.astype(jnp.int32), table
