"""Sampling on Hopper: a cluster of thread blocks for each row, which does what the row asks for.

Called by `op.sampling`. The row stays in shared memory (see `cluster_row`). A greedy row costs one
pass; penalties one more; min-p nothing; top-k and top-p search their bounds with a few candidates a
pass, and stop when no two tokens are left to choose between. Noise is made for the tiles that still
have a chance. All decisions are the device's, so that nothing makes the host wait.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels import cluster_row
from arctic_jax.pallas_kernels.cluster_row import ALL, Row, unsupported
from arctic_jax.pallas_kernels.sampling.reference import INFINITY, adjust, farthest

__all__ = ["Config", "sampling", "unsupported"]

# The first bounds a search tries: most sets end between these distances.
FIRST = (1.0, 4.0, 12.0)
# Noise is between -4.48 and 15.95: what is farther than their difference never wins.
HOPELESS = int(np.float32(20.5).view(np.int32))


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the sampling kernel.

    Attributes:
        spread: of a row over thread blocks.
        candidates: bounds that one pass tries.
    """

    spread: cluster_row.Config
    candidates: int

    def __post_init__(self):
        if not 1 <= 2 * self.candidates <= cluster_row.WORDS:
            raise ValueError(f"{self.candidates=} must be 1 to {cluster_row.WORDS // 2}")

    @property
    def passes(self) -> int:
        """Most passes of one search."""
        passes, left = 1, INFINITY + 1
        while left > 1:
            passes, left = passes + 1, -(-left // (self.candidates + 1))
        return passes


def choose_config(V: int) -> Config:
    """Return the sizes for rows of `V` logits."""
    return Config(cluster_row.choose_config(V), candidates=2)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
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
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, Array]:
    """See `op.sampling`."""
    R, V = logits.shape
    config = config or choose_config(V)
    floats = (repetition_penalty, frequency_penalty, presence_penalty, temperature, top_p)
    words = [state_row, bias_row, top_k, farthest(min_p), seed[:, 0], seed[:, 1], step]
    words += [lax.bitcast_convert_type(x, jnp.int32) for x in floats]
    tokens, finite = cluster_row.run(
        functools.partial(_body, vocab=V, config=config),
        [*map(cluster_row.whole_tiles, (logits, seen, bias)), jnp.stack(words, axis=1)],
        [jax.ShapeDtypeStruct((R,), jnp.int32)] * 2,
        vocab=V,
        turns=2 * config.passes + 3,
        config=config.spread,
        interpret=interpret,
        name="sampling",
    )
    return tokens, finite > 0


def _body(
    row: Row,
    logits_gmem,  # [R, width]
    seen_gmem,  # [N, width]
    bias_gmem,  # [B, width]
    words_gmem,  # [R, 12]
    tokens_gmem,  # [R], written
    finite_gmem,  # [R], written
    *,
    vocab: int,
    config: Config,
):
    words = [words_gmem[row.index, i] for i in range(12)]
    state_row, bias_row, top_k, bound, *seed, step = words[:7]
    floats = [lax.bitcast_convert_type(word, jnp.float32) for word in words[7:]]
    *penalties, temperature, top_p = floats

    found = row.load(logits_gmem, keep=(temperature > 0) | (state_row >= 0))
    damaged, largest, first = lax.cond(
        state_row >= 0,
        lambda: _adjust(row, seen_gmem, bias_gmem, state_row, bias_row, penalties, found[0]),
        lambda: found,
    )
    damaged, *best = row.exchange(0, *(x.astype(jnp.float32) for x in (damaged, largest, first)))
    largest, likeliest = cluster_row.largest(*best)

    def drawn():
        _to_distances(row, largest, temperature)
        kept, turn = lax.cond(
            (top_k > 0) & (top_k < vocab),
            lambda: _search(row, 1, bound, top_k.astype(jnp.float32), None, None, config),
            lambda: (bound, jnp.int32(1)),
        )
        marks = lax.cond(kept < INFINITY, lambda: row.mark(kept), lambda: jnp.int32(ALL))

        def by_top_p():
            _, mass = _within(row, turn, [kept], _weight, marks)
            return _search(row, turn + 1, kept, top_p * mass, _weight, marks, config)

        kept, turn = lax.cond(top_p < 1, by_top_p, lambda: (kept, turn))
        kept = jnp.minimum(kept, HOPELESS)
        marks = lax.cond(marks == ALL, lambda: row.mark(kept), lambda: marks)
        best = _perturbed_argmax(row, kept, seed, step, marks)
        return cluster_row.largest(*row.exchange(turn, *(x.astype(jnp.float32) for x in best)))[1]

    token = lax.cond(temperature > 0, drawn, lambda: likeliest).astype(jnp.int32)

    @pl.when(row.block == 0)
    def _():
        tokens_gmem[row.index] = token
        usable = (cluster_row.total(damaged) == 0) & (largest > -jnp.inf)
        finite_gmem[row.index] = jnp.where(usable, 1, 0)


def _adjust(
    row: Row,
    seen_gmem,
    bias_gmem,
    state_row: Array,
    bias_row: Array,
    penalties: list[Array],
    damaged: Array,
) -> tuple[Array, Array, Array]:
    """Apply penalties and biases.

    Returns:
        `damaged` and how many entries are too large or no numbers now, the largest entry of this
        block's share, and its position.
    """

    def step(tiles, carry):
        overflown, best = carry
        seen = [row.fetch(seen_gmem, state_row, tile) for tile in tiles]
        bias = [row.fetch(bias_gmem, bias_row, tile) for tile in tiles]
        adjusted = []
        for tile, *state in zip(tiles, seen, bias, strict=True):
            x = row.where_present(tile, adjust(row[tile], *state, *penalties), -jnp.inf)
            row[tile] = x
            adjusted.append(x)
            overflown += 1 - (x < jnp.inf).astype(jnp.int32)
        return overflown, row.argmax_step(tiles, adjusted, best)

    overflown, best = row.fold(step, (row.full(0), row.argmax_start()))
    return damaged + overflown.sum(), *row.argmax_end(best)


def _to_distances(row: Row, largest: Array, temperature: Array) -> None:
    """Replace logits by their distances below the largest, in units of the temperature."""

    def step(tiles, _):
        logits = [row[tile] for tile in tiles]
        for tile, x in zip(tiles, logits, strict=True):
            row[tile] = (largest - x) / temperature

    row.fold(step, None)


def _weight(distance: Array) -> Array:
    return jnp.exp2(distance * -math.log2(math.e))


def _within(
    row: Row, turn, bounds: list[Array], weight: Callable | None, marks: Array | None
) -> list[Array]:
    """How many entries of the whole row are within each bound; then what they weigh, if asked."""

    def step(tiles, sums):
        for distance in [row[tile] for tile in tiles]:
            within = [lax.bitcast_convert_type(distance, jnp.int32) <= bound for bound in bounds]
            terms = [inside.astype(jnp.int32) for inside in within]
            if weight is not None:
                weights = weight(distance)
                terms += [jnp.where(inside, weights, 0.0) for inside in within]
            sums = [total + term for total, term in zip(sums, terms, strict=True)]
        return sums

    sums = [row.full(0) for _ in bounds]
    sums += [row.full(0.0) for _ in bounds if weight is not None]
    totals = [total.sum().astype(jnp.float32) for total in row.fold(step, sums, marks)]
    return [cluster_row.total(posted) for posted in row.exchange(turn, *totals)]


def _search(
    row: Row,
    turn,
    bound: Array,
    needed: Array,
    weight: Callable | None,
    marks: Array | None,
    config: Config,
) -> tuple[Array, Array]:
    """Find the smallest bound, at most `bound`, within which the entries weigh `needed`.

    A weight of `None` is 1. The bound is in `(low, high]`; `fewer` and `more` entries are within
    these two. One entry between them is the end, whatever lies between the numbers.

    Returns:
        The bound, or a larger one that keeps the same entries; and the next turn.
    """

    def narrow(carry, tried):
        low, high, fewer, more, turn = carry
        tried = [jnp.minimum(candidate, high) for candidate in tried]
        totals = _within(row, turn, tried, weight, marks)
        found = list(zip(tried, totals[: len(tried)], totals[-len(tried) :], strict=True))
        for candidate, count, mass in found:
            low = jnp.where(mass < needed, candidate, low)
            fewer = jnp.where(mass < needed, count, fewer)
        for candidate, count, mass in reversed(found):
            high = jnp.where(mass < needed, high, candidate)
            more = jnp.where(mass < needed, more, count)
        return low, high, fewer, more, turn + 1

    def undecided(carry):
        low, high, fewer, more, _ = carry
        return (high - low > 1) & (more - fewer > 1)

    def divide(carry):
        low, high, *_ = carry
        stride = lax.div(high - low + config.candidates, config.candidates + 1)
        return narrow(carry, [low + stride * (i + 1) for i in range(config.candidates)])

    carry = (jnp.int32(-1), bound, jnp.float32(0), jnp.float32(row.vocab), jnp.int32(turn))
    carry = narrow(carry, [jnp.int32(np.float32(x).view(np.int32)) for x in FIRST])
    _, high, _, _, turn = lax.while_loop(undecided, divide, carry)
    return high, turn


def _perturbed_argmax(
    row: Row, bound: Array, seed: list[Array], step: Array, marks: Array
) -> tuple[Array, Array]:
    """Return the largest sum of noise and logit of this block's share, and its position."""
    key = _threefry2x32(*seed, jnp.int32(0), step)

    def perturb(tiles, best):
        sums = []
        for tile, distance in [(tile, row[tile]) for tile in tiles]:
            within = lax.bitcast_convert_type(distance, jnp.int32) <= bound
            noise = _gumbel(key, row.positions(tile))
            sums.append(jnp.where(within, noise - distance, -jnp.inf))
        return row.argmax_step(tiles, sums, best)

    # The code of more tiles at once would not fit the instruction cache.
    together = math.gcd(row.unroll, 2)
    best = row.fold(perturb, row.argmax_start(), marks, together)
    return row.argmax_end(best)


def _gumbel(key: tuple[Array, Array], position: Array) -> Array:
    """Return the numbers that `jax.random.gumbel` has at these places of a vector."""
    high, low = _threefry2x32(*key, jnp.int32(0), position)
    mantissa = lax.shift_right_logical(high ^ low, 9) | 0x3F800000
    uniform = lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
    uniform = jnp.maximum(uniform, float(np.finfo(np.float32).tiny))
    return -jnp.log(-jnp.log(uniform))


def _threefry2x32(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """The Threefry-2x32 block cipher of 20 rounds (Salmon et al., 2011), on int32 words."""
    keys = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << distance) | lax.shift_right_logical(x1, 32 - distance))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + (group + 1)
    return x0, x1
