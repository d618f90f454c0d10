"""Segment attention: the public function, its argument checks and its dispatch."""

from jax import Array
from jaxtyping import Float, Int

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.segment_attention import reference


def segment_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    segment_ids: Int[Array, " T"],
    *,
    window: int,
    scale: float,
    causal: bool = False,
    implementation: str | None = None,
) -> Float[Array, "T H D"]:
    """Softmax attention of every token to the tokens of its own segment.

    Sequences lie one after another in a flat batch. None crosses a multiple of `window`, so that
    attention is `T / window` blocks on the diagonal, whatever lies in them. H may be split over
    devices.

    Args:
        q: queries; H is a multiple of K, and head h reads the keys of head h // (H / K).
        k: keys.
        v: values.
        segment_ids: equal for the tokens of a segment, different for different segments within a
            window. Padding is a segment like any other.
        window: static; T is a multiple of it.
        scale: factor on the scores.
        causal: whether a token sees only itself and those before it.
        implementation: see `dispatch.resolve`.

    Raises:
        ValueError: shapes do not fit each other; the values are in the message.
    """
    if k.shape != v.shape or q.ndim != 3 or k.ndim != 3 or q.shape[::2] != k.shape[::2]:
        raise ValueError(f"{q.shape=}, {k.shape=} and {v.shape=} do not fit")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape=}, {k.shape=} and {v.shape=} do not fit")
    if segment_ids.shape != q.shape[:1] or window < 1 or q.shape[0] % window:
        raise ValueError(f"{segment_ids.shape=} and {window=} do not fit {q.shape=}")
    chosen = dispatch.resolve("segment_attention", implementation, "xla")
    if chosen != "xla":
        reason = mosaic_gpu_unsupported(q)
        raise ValueError(f"segment_attention: implementation={chosen!r} cannot do this: {reason}")
    return reference.segment_attention(q, k, v, segment_ids, window, scale, causal)


def mosaic_gpu_unsupported(*_: Array, **__: object) -> str | None:
    """Return why `"mosaic_gpu"` does not take these arguments: there is no such kernel so far."""
    return "segment_attention has no mosaic_gpu kernel"
