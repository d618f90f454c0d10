"""Segment attention: the public function, its argument checks and its dispatch."""

import jax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.segment_attention import mosaic_gpu, reference

PREFERRED = "mosaic_gpu"
"""On an H200, where both run: 4 to 12 times as fast."""


def segment_attention(
    qkv: Float[Array, "T H+2*K D"],
    bounds: Int[Array, "2 T"],
    *,
    num_kv_heads: int,
    window: int,
    scale: float,
    causal: bool = False,
    implementation: str | None = None,
) -> Float[Array, "T H D"]:
    """Softmax attention of every token to the tokens of its own segment.

    Sequences lie one after another in a flat batch. None crosses a multiple of `window`, so that
    attention is `T / window` blocks on the diagonal, whatever lies in them. `"mosaic_gpu"` looks
    at no more than the segments: a window may be the whole batch.

    Args:
        qkv: what one projection yields for a token: its H queries, K keys and K values. H is a
            multiple of K, and head h reads the keys of head h // (H / K). All of it is finite, that
            of padding included: a weight of 0 does not silence what is not.
        bounds: of each token's segment, its first token and the one after its last. What is
            padding best belongs to short segments, of a token each.
        num_kv_heads: K.
        window: static; T is a multiple of it.
        scale: factor on the scores.
        causal: whether a token sees only itself and those before it.
        implementation: see `dispatch.resolve`.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if qkv.ndim != 3 or num_kv_heads < 1 or qkv.shape[1] <= 2 * num_kv_heads:
        raise ValueError(f"{qkv.shape=} and {num_kv_heads=} do not fit")
    if qkv.shape[1] % num_kv_heads:
        raise ValueError(f"{qkv.shape[1]} heads are no multiple of {num_kv_heads=}")
    if bounds.shape != (2, qkv.shape[0]) or window < 1 or qkv.shape[0] % window:
        raise ValueError(f"{bounds.shape=} and {window=} do not fit {qkv.shape=}")
    reason = mosaic_gpu_unsupported(qkv, bounds)
    chosen = dispatch.resolve("segment_attention", implementation, "xla" if reason else PREFERRED)
    if chosen == "xla":
        return reference.segment_attention(qkv, bounds, num_kv_heads, window, scale, causal)
    if reason:
        raise ValueError(f"segment_attention: implementation={chosen!r} cannot do this: {reason}")
    return mosaic_gpu.segment_attention(
        qkv, bounds, num_kv_heads, scale, causal, interpret=dispatch.interpreter()
    )


def mosaic_gpu_unsupported(qkv: Array, *_: Array, **__: object) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments of `segment_attention`, or `None`.

    Only shapes and dtypes are looked at.
    """
    return mosaic_gpu.unsupported(qkv)


def skips_other_segments(dtype: DTypeLike, head_dim: int, implementation: str | None) -> bool:
    """Return whether short segments cost little in a wide window, of a multiple of 64 tokens.

    If not, scores of a whole window are computed, whatever lies in it.

    Args:
        dtype: of the projection.
        head_dim: D.
        implementation: as `segment_attention` will be given it.

    Raises:
        ValueError: the implementation is unknown or cannot run here.
    """
    qkv = jax.ShapeDtypeStruct((mosaic_gpu.ROWS, 3, head_dim), dtype)
    reason = mosaic_gpu.unsupported(qkv)
    preferred = "xla" if reason else PREFERRED
    return dispatch.resolve("segment_attention", implementation, preferred) == "mosaic_gpu"
