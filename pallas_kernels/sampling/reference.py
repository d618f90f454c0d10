"""Sampling in plain jnp: the specification, and the implementation `"xla"`.

Nothing is sorted. What is drawn from are distances below the highest logit; they are not negative,
so their bits order like integers, and the bounds of top-k and top-p are found bit by bit, exactly.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

IN_PROMPT = 1 << 30
"""Flag in `seen`; the bits below count the token's occurrences in the output."""
INFINITY = 0x7F800000  # the bits of the largest distance


def sampling(
    logits: Array,
    seen: Array,
    bias: Array,
    state_row: Array,
    bias_row: Array,
    repetition_penalty: Array,
    frequency_penalty: Array,
    presence_penalty: Array,
    temperature: Array,
    min_p: Array,
    top_k: Array,
    top_p: Array,
    seed: Array,
    step: Array,
) -> tuple[Array, Array]:
    """See `op.sampling`."""
    adjusted = lax.cond(
        jnp.any(state_row >= 0),
        lambda: jnp.where(
            (state_row >= 0)[:, None],
            adjust(
                logits,
                seen[jnp.maximum(state_row, 0)],
                bias[jnp.maximum(bias_row, 0)],
                repetition_penalty[:, None],
                frequency_penalty[:, None],
                presence_penalty[:, None],
            ),
            logits,
        ),
        lambda: logits,
    )
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    drawn = lambda: draw(adjusted, temperature, min_p, top_k, top_p, seed, step)
    tokens = lax.cond(
        jnp.any(temperature > 0),
        lambda: jnp.where(temperature > 0, drawn(), greedy),
        lambda: greedy,
    )
    # Penalties may overflow, and biases may forbid every token.
    highest = jnp.take_along_axis(adjusted, greedy[:, None], axis=-1)[:, 0]
    return tokens, jnp.isfinite(logits).all(axis=-1) & jnp.isfinite(highest)


def adjust(
    logits: Array,
    seen: Array,
    bias: Array,
    repetition_penalty: Array,
    frequency_penalty: Array,
    presence_penalty: Array,
) -> Array:
    """Apply penalties and biases; the arrays are of one shape or broadcast to it."""
    count = (seen & (IN_PROMPT - 1)).astype(jnp.float32)
    repetition = jnp.where(seen > 0, repetition_penalty, 1.0)
    x = jnp.where(logits > 0, logits / repetition, logits * repetition)
    x = x - frequency_penalty * count - presence_penalty * jnp.where(count > 0, 1.0, 0.0)
    return x + bias


def farthest(min_p: Array) -> Array:
    """Return the bits of the largest distance that min-p keeps; 0 keeps everything."""
    return lax.bitcast_convert_type(jnp.abs(jnp.log(min_p)), jnp.int32)


def draw(
    logits: Array,
    temperature: Array,
    min_p: Array,
    top_k: Array,
    top_p: Array,
    seed: Array,
    step: Array,
) -> Array:
    """Draw a token for each row after temperature, min-p, top-k and top-p."""
    # A difference first, so that a tiny temperature cannot make infinities of several tokens.
    distance = logits.max(axis=-1, keepdims=True) - logits
    distance = distance / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    bits = lax.bitcast_convert_type(distance, jnp.int32)
    bound = farthest(min_p)

    def by_top_k(bound: Array) -> Array:
        needed = jnp.where(top_k > 0, top_k, bits.shape[1]).astype(jnp.float32)
        found = nearest_bound(bits, jnp.ones_like(distance), needed, bound)
        return jnp.where(top_k > 0, found, bound)

    def by_top_p(bound: Array) -> Array:
        weights = jnp.exp(-distance)
        kept = jnp.where(bits <= bound[:, None], weights, 0.0).sum(axis=-1)
        found = nearest_bound(bits, weights, top_p * kept, bound)
        return jnp.where(top_p < 1, found, bound)

    bound = lax.cond(jnp.any(top_k > 0), by_top_k, lambda bound: bound, bound)
    bound = lax.cond(jnp.any(top_p < 1), by_top_p, lambda bound: bound, bound)
    keys = jax.random.wrap_key_data(lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, step)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, bits.shape[1:], jnp.float32))(keys)
    candidates = jnp.where(bits <= bound[:, None], noise - distance, -jnp.inf)
    return jnp.argmax(candidates, axis=-1).astype(jnp.int32)


def nearest_bound(bits: Array, weights: Array, needed: Array, bound: Array) -> Array:
    """Return the smallest bound within which the weights sum to `needed`; at most `bound`.

    All entries that are equally far are within or beyond it together.
    """

    def next_bit(i: Array, beyond: Array) -> Array:  # the largest that is too small, plus one
        candidate = beyond + (jnp.int32(1 << 30) >> i)
        mass = jnp.sum(jnp.where(bits < candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where((mass < needed) & (candidate <= bound), candidate, beyond)

    return lax.fori_loop(0, 31, next_bit, jnp.zeros_like(bound))
