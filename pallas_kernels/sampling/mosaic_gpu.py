"""Sampling on Hopper: a cluster of thread blocks for each row, which does what the row asks for.

Called by `op.sampling`. The row stays in shared memory (see `cluster_row`). A greedy row costs one
pass; penalties one more; min-p nothing; top-k and top-p search their bounds with a few candidates a
pass, and stop when no two tokens are left to choose between. Noise is made for the tiles that still
have a chance. All decisions are the device's, so that nothing makes the host wait.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels import cluster_row
from arctic_jax.pallas_kernels.cluster_row import Row, unsupported
from arctic_jax.pallas_kernels.sampling.reference import INFINITY, adjust, farthest

__all__ = ["Config", "sampling", "unsupported"]

# Floats of at most 1 - 2^-23 make Gumbel noise of at most 15.95.
MOST_NOISE = 16.0


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
        passes, left = 0, INFINITY + 1
        while left > 1:
            passes, left = passes + 1, -(-left // (self.candidates + 1))
        return passes


def choose_config(V: int) -> Config:
    """Return the sizes for rows of `V` logits."""
    return Config(cluster_row.choose_config(V), candidates=3)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def sampling(
    logits: Array,
    seen: Array,
    bias: Array,
    state_row: Array,
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
    words = [state_row, top_k, farthest(min_p), seed[:, 0], seed[:, 1], step]
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
    bias_gmem,  # [N, width]
    words_gmem,  # [R, 11]
    tokens_gmem,  # [R], written
    finite_gmem,  # [R], written
    *,
    vocab: int,
    config: Config,
):
    words = [words_gmem[row.index, i] for i in range(11)]
    state_row, top_k, bound, *seed, step = words[:6]
    floats = [lax.bitcast_convert_type(word, jnp.float32) for word in words[6:]]
    *penalties, temperature, top_p = floats

    damaged = row.load(logits_gmem)
    damaged += lax.cond(
        state_row >= 0,
        lambda: _adjust(row, seen_gmem, bias_gmem, state_row, penalties),
        lambda: jnp.int32(0),
    )
    largest, first = row.argmax()
    [damaged] = row.exchange(0, damaged.astype(jnp.float32))
    largest, likeliest = row.best(1, largest, first)

    def drawn():
        _to_distances(row, largest, temperature)
        kept, turn = lax.cond(
            (top_k > 0) & (top_k < vocab),
            lambda: _search(row, 2, bound, top_k.astype(jnp.float32), None, config),
            lambda: (bound, jnp.int32(2)),
        )

        def by_top_p():
            _, mass = _within(row, turn, [kept], _weight)
            return _search(row, turn + 1, kept, top_p * mass, _weight, config)

        kept, turn = lax.cond(top_p < 1, by_top_p, lambda: (kept, turn))
        return row.best(turn, *_perturbed_argmax(row, kept, seed, step))[1]

    token = lax.cond(temperature > 0, drawn, lambda: likeliest)

    @pl.when(row.block == 0)
    def _():
        tokens_gmem[row.index] = token
        usable = (sum(damaged) == 0) & (largest > -jnp.inf)
        finite_gmem[row.index] = jnp.where(usable, 1, 0)


def _adjust(row: Row, seen_gmem, bias_gmem, state_row: Array, penalties: list[Array]) -> Array:
    """Apply penalties and biases; return how many entries are too large, or no numbers, then."""

    def step(tiles, damaged):
        seen = [row.fetch(seen_gmem, state_row, tile) for tile in tiles]
        bias = [row.fetch(bias_gmem, state_row, tile) for tile in tiles]
        for tile, seen, bias in zip(tiles, seen, bias, strict=True):
            x = row.where_present(tile, adjust(row[tile], seen, bias, *penalties), -jnp.inf)
            row[tile] = x
            damaged += 1 - (x < jnp.inf).astype(jnp.int32)
        return damaged

    return row.fold(step, row.full(0), row.unroll).sum()


def _to_distances(row: Row, largest: Array, temperature: Array) -> None:
    """Replace logits by their distances below the largest, in units of the temperature."""

    def step(tiles, _):
        row[tiles[0]] = (largest - row[tiles[0]]) / temperature

    row.fold(step, None)


def _weight(distance: Array) -> Array:
    return jnp.exp(-distance)


def _within(row: Row, turn, bounds: list[Array], weight: Callable | None) -> list[Array]:
    """How many entries of the whole row are within each bound; then what they weigh, if asked."""

    def step(tiles, sums):
        distance = row[tiles[0]]
        bits = lax.bitcast_convert_type(distance, jnp.int32)
        counts = [(bits <= bound).astype(jnp.int32) for bound in bounds]
        masses = []
        if weight is not None:
            weights = weight(distance)
            masses = [jnp.where(bits <= bound, weights, 0.0) for bound in bounds]
        return [total + new for total, new in zip(sums, counts + masses, strict=True)]

    sums = [row.full(0) for _ in bounds]
    sums += [row.full(0.0) for _ in bounds if weight is not None]
    totals = [total.sum().astype(jnp.float32) for total in row.fold(step, sums)]
    return [sum(blocks) for blocks in row.exchange(turn, *totals)]


def _search(
    row: Row, turn, bound: Array, needed: Array, weight: Callable | None, config: Config
) -> tuple[Array, Array]:
    """Find the smallest bound, at most `bound`, within which the entries weigh `needed`.

    A weight of `None` is 1. The bound is in `(low, high]`; `fewer` and `more` entries are within
    these two. One entry between them is the end, whatever lies between the numbers.

    Returns:
        The bound, or a larger one that keeps the same entries; and the next turn.
    """
    n = config.candidates

    def undecided(carry):
        low, high, fewer, more, _ = carry
        return (high - low > 1) & (more - fewer > 1)

    def narrow(carry):
        low, high, fewer, more, turn = carry
        stride = lax.div(high - low + n, n + 1)
        tried = [jnp.minimum(low + stride * (i + 1), high) for i in range(n)]
        totals = _within(row, turn, tried, weight)
        found = list(zip(tried, totals[:n], totals[-n:], strict=True))
        for candidate, count, mass in found:
            low = jnp.where(mass < needed, candidate, low)
            fewer = jnp.where(mass < needed, count, fewer)
        for candidate, count, mass in reversed(found):
            high = jnp.where(mass < needed, high, candidate)
            more = jnp.where(mass < needed, more, count)
        return low, high, fewer, more, turn + 1

    carry = (jnp.int32(-1), bound, jnp.float32(0), jnp.float32(row.vocab), jnp.int32(turn))
    _, high, _, _, turn = lax.while_loop(undecided, narrow, carry)
    return high, turn


def _perturbed_argmax(row: Row, bound: Array, seed: list[Array], step: Array):
    """Return the largest sum of noise and logit of this block's share, and its position."""
    key = _threefry2x32(*seed, jnp.int32(0), step)

    def visit(tile, best, position):
        distance = row[tile]
        bits = lax.bitcast_convert_type(distance, jnp.int32)
        places = row.positions(tile)
        sums = jnp.where(bits <= bound, _gumbel(key, places) - distance, -jnp.inf)
        value = sums.max()
        place = jnp.where(sums == value, places, row.vocab - 1).min()
        return jnp.where(value > best, value, best), jnp.where(value > best, place, position)

    def consider(tiles, carry):
        best, position = carry
        nearest = row[tiles[0]].min()
        kept = lax.bitcast_convert_type(nearest, jnp.int32) <= bound
        return lax.cond(
            kept & (MOST_NOISE - nearest > best),
            lambda: visit(tiles[0], best, position),
            lambda: (best, position),
        )

    return row.fold(consider, (jnp.float32(-jnp.inf), jnp.int32(0)))


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
