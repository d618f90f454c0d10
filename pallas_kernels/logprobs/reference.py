"""Log-probabilities in plain jnp: the specification, and the implementation `"xla"`."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def logprobs(
    logits: Array, target: Array, wanted: Array, *, top: int
) -> tuple[Array, Array, Array, Array]:
    """See `op.logprobs`."""
    R, V = logits.shape

    def report() -> tuple[Array, Array, Array, Array]:
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)
        rank = (logits > chosen).sum(axis=-1).astype(jnp.int32) + 1
        best, ids = lax.top_k(logits, min(top, V))
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        pad = ((0, 0), (0, top - best.shape[1]))
        ids, best = jnp.pad(ids.astype(jnp.int32), pad), jnp.pad(best - total, pad)
        return (chosen - total)[:, 0], rank, ids, best

    def nothing() -> tuple[Array, Array, Array, Array]:
        table = jnp.zeros((R, top))
        return jnp.zeros(R), jnp.zeros(R, jnp.int32), table.astype(jnp.int32), table

    return lax.cond(wanted > 0, report, nothing)
