"""Log-probabilities on Hopper: a cluster of thread blocks for each row, which may do nothing.

Called by `op.logprobs`. The row stays in shared memory (see `cluster_row`). Each block takes the
largest entries of its share out one by one, and the first block merges what they found.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels import cluster_row
from arctic_jax.pallas_kernels.cluster_row import Config, Row, choose_config, unsupported

__all__ = ["logprobs", "unsupported"]


@functools.partial(jax.jit, static_argnames=("top", "config", "interpret"))
def logprobs(
    logits: Array,
    target: Array,
    wanted: Array,
    *,
    top: int,
    config: Config | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, Array, Array, Array]:
    """See `op.logprobs`."""
    R, V = logits.shape
    picks = min(top, V)
    vector, table = (R,), (R, max(picks, 1))
    outputs = cluster_row.run(
        functools.partial(_body, picks=picks),
        [cluster_row.whole_tiles(logits), target, wanted[None]],
        [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape in (vector, table)
            for dtype in (jnp.float32, jnp.int32)
        ],
        vocab=V,
        turns=2 + picks,
        config=config or choose_config(V),
        interpret=interpret,
        name="logprobs",
    )
    # What is not wanted was not written.
    chosen, rank, best, ids = (jnp.where(wanted > 0, x, jnp.zeros_like(x)) for x in outputs)
    pad = ((0, 0), (0, top - picks))
    return chosen, rank, jnp.pad(ids[:, :picks], pad), jnp.pad(best[:, :picks], pad)


def _body(
    row: Row,
    logits_gmem,  # [R, width]
    target_gmem,  # [R]
    wanted_gmem,  # [1]
    logprob_gmem,  # [R], written
    rank_gmem,  # [R], written
    best_gmem,  # [R, picks], written
    ids_gmem,  # [R, picks], written
    *,
    picks: int,
):
    @pl.when(wanted_gmem[0] > 0)
    def report():
        chosen = logits_gmem[row.index, target_gmem[row.index]]
        _, largest, _ = row.load(logits_gmem)
        largest = functools.reduce(jnp.maximum, row.exchange(0, largest)[0])
        larger, total = _sums(row, chosen, largest)

        def pick(i, carry):
            value, position = row.argmax()
            row.post(2 + i, value, position.astype(jnp.float32))
            row.remove(position)
            return carry

        lax.fori_loop(0, picks, pick, ())
        if picks:
            row.sync()

        @pl.when(row.block == 0)
        def write():
            log_total = largest + jnp.log(total)
            logprob_gmem[row.index] = chosen - log_total
            rank_gmem[row.index] = larger.astype(jnp.int32) + 1

            def merge(i, taken):  # taken: how many of each block's picks
                turns = [2 + t for t in taken]
                values, positions = (row.read(turns, word) for word in (0, 1))
                value, owner = cluster_row.largest(values, range(len(values)))
                position = cluster_row.largest(values, positions)[1]
                best_gmem[row.index, i] = value - log_total
                ids_gmem[row.index, i] = position.astype(jnp.int32)
                return [t + jnp.where(owner == b, 1, 0) for b, t in enumerate(taken)]

            lax.fori_loop(0, picks, merge, [jnp.int32(0)] * row.blocks)


def _sums(row: Row, chosen: Array, largest: Array) -> list[Array]:
    """Return how many entries are larger than `chosen`, and the sum of all exponentials."""

    def step(tiles, sums):
        larger, total = sums
        for x in [row[tile] for tile in tiles]:
            larger += (x > chosen).astype(jnp.int32)
            total += jnp.exp(x - largest)
        return larger, total

    larger, total = row.fold(step, (row.full(0), row.full(0.0)))
    posted = row.exchange(1, larger.sum().astype(jnp.float32), total.sum())
    return [cluster_row.total(values) for values in posted]
