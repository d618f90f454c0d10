"""Product of few rows with matrices of their own on Hopper: the kernel of `ragged_dot`.

That takes any list of tiles and rows; here each row is one item of it, and all lie in one tile, of
which each item stores its own row. An expert's matrix is read for each of its rows, all but once
from the L2 cache. Its 64 outputs a thread block are bound by memory, so that a tile of 64 rows, of
which one is used, costs nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from arctic_jax.pallas_kernels.ragged_dot import mosaic_gpu as ragged_dot

MOST_ROWS = 64
CONFIG = ragged_dot.Config(MOST_ROWS, 64)


def unsupported(rows: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct) -> str | None:
    """Return why this kernel does not take the shapes, or `None` if it does."""
    if rows.shape[0] > MOST_ROWS:
        return f"{rows.shape[0]} rows are more than {MOST_ROWS}"
    return ragged_dot.unsupported(rows, weight)


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames="interpret")
def expert_dot(
    rows: Array,
    weight: Array,
    experts: Array,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """See `op.expert_dot`."""
    place = jnp.arange(len(rows), dtype=jnp.int32)
    exists = (experts >= 0) & (experts < len(weight))
    work = jnp.stack([jnp.where(exists, experts, 0), 0 * place, place, exists.astype(jnp.int32)])
    return ragged_dot.run(work, rows, weight, CONFIG, interpret)
