"""Segment attention in plain jnp: the specification, and the implementation `"xla"`.

One dense product for each window. Scores of other segments are computed and masked away: their
share is small, because a window is hardly longer than the sequences in it.
"""

import jax.numpy as jnp
from jax import Array


def segment_attention(
    qkv: Array, bounds: Array, num_kv_heads: int, window: int, scale: float, causal: bool
) -> Array:
    """See `op.segment_attention`."""
    heads = qkv.shape[1] - 2 * num_kv_heads
    q, k, v = jnp.split(qkv, (heads, heads + num_kv_heads), axis=1)
    tokens, _, head_dim = q.shape
    if num_kv_heads != heads:
        k, v = (jnp.repeat(x, heads // num_kv_heads, axis=1) for x in (k, v))
    windows = (tokens // window, window, heads, head_dim)
    q, k, v = (x.reshape(windows) for x in (q, k, v))
    starts = bounds[0].reshape(windows[:2])
    scores = jnp.einsum("wqhd,wkhd->whqk", q, k, preferred_element_type=jnp.float32) * scale
    seen = starts[:, :, None] == starts[:, None, :]
    if causal:
        seen &= jnp.tri(window, dtype=bool)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)  # a token sees itself: no row is empty
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum(
        "whqk,wkhd->wqhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = out / jnp.swapaxes(weights.sum(-1), 1, 2)[..., None]
    return out.reshape(tokens, heads, head_dim).astype(q.dtype)
