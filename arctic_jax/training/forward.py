"""A decoder on whole sequences, without cache: what is differentiated. Pure.

Teacher and student share their weights and, up to where the student narrows, their activations: so
one pass through the lower layers serves both. Weights are a dictionary by checkpoint names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from arctic_jax.config import ModelConfig
from arctic_jax.models.layers import rotary, rotate
from arctic_jax.pallas_kernels.add_rms_norm.reference import rms_norm

Weights = Mapping[str, Array]
Implementation = Literal["xla", "cudnn"]
"""Of `jax.nn.dot_product_attention`."""

KEPT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
"""What the way back finds: linear layers. Attention, which is larger, is computed again."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["token_ids", "positions", "segment_ids", "counts"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Batch:
    """Rows of packed sequences, each array `[B, S]`.

    Attributes:
        token_ids: padding is token 0.
        positions: of each token in its sequence.
        segment_ids: which sequence of its row, from 1 on; 0 for padding.
        counts: whether this token's prediction of its successor counts.
    """

    token_ids: Array
    positions: Array
    segment_ids: Array
    counts: Array


@dataclass(frozen=True)
class Hidden:
    """Activations `[B, S, hidden]` of one model.

    Attributes:
        before_last: what goes into the last layer (`hidden_states[-2]` of `transformers`).
        last: what comes out of the last norm.
    """

    before_last: Array
    last: Array


def teacher_and_student(
    weights: Weights,
    own: Weights,
    config: ModelConfig,
    batch: Batch,
    attention: Implementation | None = None,
) -> tuple[Hidden, Hidden]:
    """Run both models; gradients flow into `own` alone.

    Args:
        weights: of the ordinary model.
        own: the student's own.
        config: of the student.
        batch: what they read.
        attention: which one; `None` for the faster one that can run.
    """
    weights = jax.lax.stop_gradient(dict(weights))
    run = _Forward(config, batch, attention)
    middle = run.lower(weights)
    return run.upper(weights, None, middle), run.upper(weights, own, middle)


def hidden_states(
    weights: Weights, config: ModelConfig, batch: Batch, attention: Implementation | None = None
) -> Hidden:
    """Run one model, ordinary or SwiftKV; `weights` are those of its checkpoint."""
    run = _Forward(config, batch, attention)
    own = weights if config.num_lower_layers < config.num_hidden_layers else None
    return run.upper(weights, own, run.lower(weights))


def logits(weights: Weights, config: ModelConfig, last: Array) -> Array:
    """`[..., hidden]` after the last norm to float32 logits `[..., vocab]`."""
    return project(output_head(weights, config), last)


def output_head(weights: Weights, config: ModelConfig) -> Array:
    """Return the output projection, `[vocab, hidden]`."""
    return weights[f"{'model.embed_tokens' if config.tie_word_embeddings else 'lm_head'}.weight"]


def project(head: Array, last: Array) -> Array:
    """`[..., hidden]` by `[vocab, hidden]` to float32 logits `[..., vocab]`."""
    return jnp.einsum("...d,vd->...v", last, head, preferred_element_type=jnp.float32)


class _Forward:
    """The layers on one batch."""

    def __init__(self, config: ModelConfig, batch: Batch, attention: Implementation | None) -> None:
        self.config, self.batch = config, batch
        self.attention: Implementation | None = attention
        positions = batch.positions.reshape(-1)
        angles = rotary(config.rope, config.head_dim, positions)
        self.rope = tuple(a.reshape(*batch.positions.shape, -1) for a in angles)

    def lower(self, weights: Weights) -> Array:
        """Embed and run the layers that both models share."""
        x = weights["model.embed_tokens.weight"][self.batch.token_ids]
        for i in range(self.config.num_lower_layers):
            x = self._ordinary_layer(weights, i, x)
        return x

    def upper(self, weights: Weights, own: Weights | None, x: Array) -> Hidden:
        """Run the rest as the ordinary model does, or as SwiftKV does with its `own` weights."""
        config, before_last = self.config, x
        layers = range(config.num_lower_layers, config.num_hidden_layers)
        if own is None:
            for i in layers:
                before_last, x = x, self._ordinary_layer(weights, i, x)
        else:
            own = {name: value.astype(x.dtype) for name, value in own.items() if "swiftkv" in name}
            source = rms_norm(x, own["model.norm_swiftkv.weight"], config.rms_norm_eps)
            owners = layers[:: config.key_value_group_size]
            caches = [self._keys_values(own, i, source, "_swiftkv") for i in owners]
            layer = jax.checkpoint(self._layer, static_argnums=1, policy=KEPT)
            for i in layers:
                k, v = caches[(i - config.num_lower_layers) // config.key_value_group_size]
                before_last, x = x, layer(dict(weights), i, x, k, v, own)
        last = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
        return Hidden(before_last, last)

    def _ordinary_layer(self, weights: Weights, i: int, x: Array) -> Array:
        k, v = self._keys_values(weights, i, self._normed(weights, x, i))
        return self._layer(weights, i, x, k, v)

    def _layer(
        self, weights: Weights, i: int, x: Array, k: Array, v: Array, own: Weights | None = None
    ) -> Array:
        """Run one layer with given keys and values; its queries are projected by `own`, if any."""
        config, there = self.config, f"model.layers.{i}"
        normed = self._normed(weights, x, i)
        if own is None:
            q = _linear(weights, f"{there}.self_attn.q_proj", normed)
        else:
            q = _linear(own, f"{there}.self_attn.q_proj_swiftkv", normed)
        q = rotate(self._heads(q), *self.rope)
        mask, attention = self._mask(config.sliding_window(i)), self.attention or _fastest(q)
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=attention)
        attended = attended.reshape(*x.shape[:-1], -1)
        x = x + _linear(weights, f"{there}.self_attn.o_proj", attended)
        norm = weights[f"{there}.post_attention_layernorm.weight"]
        normed = rms_norm(x, norm, config.rms_norm_eps)
        gate = jax.nn.silu(_linear(weights, f"{there}.mlp.gate_proj", normed))
        up = _linear(weights, f"{there}.mlp.up_proj", normed)
        return x + _linear(weights, f"{there}.mlp.down_proj", gate * up)

    def _keys_values(
        self, weights: Weights, i: int, x: Array, suffix: str = ""
    ) -> tuple[Array, Array]:
        there = f"model.layers.{i}.self_attn"
        k = self._heads(_linear(weights, f"{there}.k_proj{suffix}", x))
        v = self._heads(_linear(weights, f"{there}.v_proj{suffix}", x))
        return rotate(k, *self.rope), v

    def _normed(self, weights: Weights, x: Array, i: int) -> Array:
        weight = weights[f"model.layers.{i}.input_layernorm.weight"]
        return rms_norm(x, weight, self.config.rms_norm_eps)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.config.head_dim)

    def _mask(self, window: int | None) -> Array:
        """`[B, 1, S, S]`: a token sees those of its sequence up to itself."""
        segments, places = self.batch.segment_ids, jnp.arange(self.batch.token_ids.shape[1])
        seen = places[None, :] <= places[:, None]
        if window is not None:
            seen &= places[None, :] > places[:, None] - window
        same = segments[:, :, None] == segments[:, None, :]
        return (same & seen)[:, None]


def _fastest(q: Array) -> Implementation:
    """Return "cudnn", which never holds all scores at once, where it can run: `q [B, S, H, D]`."""
    capability = getattr(jax.devices()[0], "compute_capability", "0.0")  # CPUs have none
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[1] % 64 == 0 and q.shape[3] <= 128
    return "cudnn" if float(capability) >= 8 and fits else "xla"


def _linear(weights: Weights, name: str, x: Array) -> Array:
    x = jnp.einsum("bsd,od->bso", x, weights[f"{name}.weight"])
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x
