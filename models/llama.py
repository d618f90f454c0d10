"""Llama 2 and 3, SmolLM2 and Mistral; and the decoder loop of every decoder in the project.

Pure; runs inside the step program. The files of the other models say only what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from arctic_jax.batch import ForwardBatch, narrow
from arctic_jax.config import ModelConfig
from arctic_jax.kv_cache import KVCache
from arctic_jax.models.layers import Attention, Embed, GatedMLP, RMSNorm, rotary
from arctic_jax.shift_parallel import MeshLayout
from arctic_jax.weights import QKV, Columns, GateUp, Rows, Source


class FeedForward(Protocol):
    """What follows the attention in a layer: dense (`GatedMLP`) or a mixture (`MoE`)."""

    def __call__(
        self, x: Array, delta: Array, norm: RMSNorm, layout: MeshLayout
    ) -> tuple[Array, Array]:
        """`x` and `delta [T/SP, hidden]` to their sum, and what is to be added to it."""
        ...


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each with a norm before and a residual around it.

    The residual stream comes as two arrays, the stream and what is still to be added to it: so that
    each sum is made together with the norm that follows it, the last one by the next layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        sliding_window: int | None,
        groups: int,
        mlp: FeedForward,
        implementation: str | None,
    ) -> None:
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(size, epsilon, implementation)
        self.attention = Attention(config, sliding_window, groups, implementation)
        self.mlp_norm = RMSNorm(size, epsilon, implementation)
        self.mlp = mlp

    def __call__(
        self,
        x: Array,
        delta: Array,
        rope: tuple[Array, Array],
        batch: ForwardBatch,
        cache: KVCache,
        layer: Array,
        layout: MeshLayout,
        *,
        narrows: bool,
    ) -> tuple[Array, Array, KVCache]:
        """`x` and `delta [T/SP, hidden]` of this layer to those of the next, with the cache.

        If the batch narrows here, to `[R, hidden]`: of the other tokens, keys and values suffice.
        """
        x, q, cache = self.attention.project(
            x, delta, self.attention_norm, rope, batch, cache, layer, layout
        )
        if narrows:
            (q, _), (x, batch) = narrow(q, batch), narrow(x, batch)
        delta = self.attention.attend(q, batch, cache, layer, layout)
        x, delta = self.mlp(x, delta, self.mlp_norm, layout)
        return x, delta, cache


# Equal layers are traced and lowered once: the program calls one function with other weights.
_run_layer = jax.jit(DecoderLayer.__call__, static_argnames="narrows")


class LlamaForCausalLM(nnx.Module):
    """A decoder-only language model.

    Args:
        config: its numbers.
        num_devices: for which weights are fused: the devices of one engine, or a multiple.
        implementation: of every operation, see `pallas_kernels.dispatch`.

    Raises:
        ValueError: heads, or the feed-forward dimension, cannot be split over P devices.
    """

    def __init__(
        self, config: ModelConfig, num_devices: int, implementation: str | None = None
    ) -> None:
        self.config = config
        self.implementation = implementation
        self.num_devices = num_devices
        self.num_kv_groups = num_kv_groups(config, num_devices)
        self.embed = Embed(config.vocab_size, config.hidden_size, num_devices)
        self.layers = nnx.List(
            [
                DecoderLayer(
                    config,
                    config.sliding_window(i),
                    self.num_kv_groups,
                    self.feed_forward(i),
                    implementation,
                )
                for i in range(config.num_lower_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Embed(config.vocab_size, config.hidden_size, num_devices)
        )

    def __call__(
        self, batch: ForwardBatch, cache: KVCache, layout: MeshLayout
    ) -> tuple[Array, KVCache]:
        """Return float32 logits `[R, vocab]` and the cache."""
        x, cache = self.hidden_states(batch, cache, layout)
        return self.logits(x, layout), cache

    def hidden_states(
        self, batch: ForwardBatch, cache: KVCache, layout: MeshLayout
    ) -> tuple[Array, KVCache]:
        """Return what comes out of the last norm, `[R, hidden]` on every device, and the cache.

        The lower layers run on every token, the upper ones (SwiftKV has some) on those that need
        logits.
        """
        rope = rotary(self.config.rope, self.config.head_dim, batch.positions)
        x = self.embed(batch.token_ids, layout)
        delta = jnp.zeros_like(x)
        early = self._narrows_in_last_layer(batch, layout)
        for i, layer in enumerate(self.layers):
            x, delta, cache = _run_layer(
                *(layer, x, delta, rope, batch, cache, np.int32(i)),
                layout=layout,
                narrows=early and i + 1 == len(self.layers),
            )
        x = x + delta
        if not early:
            x = layout.gather_tokens(x)
            cache = self.fill_upper_cache(x, rope, batch, cache)
            x, batch = narrow(x, batch)
            x = self.run_upper_layers(x, batch, cache, layout.narrow)
        return self.norm(x), cache

    def logits(self, x: Array, layout: MeshLayout) -> Array:
        """Return float32 logits `[R, vocab]` of `hidden_states`."""
        return self.head.logits(x, layout)

    @property
    def head(self) -> Embed:
        """The output projection, which may be the embedding."""
        return self.lm_head or self.embed

    def _narrows_in_last_layer(self, batch: ForwardBatch, layout: MeshLayout) -> bool:
        """Whether the last of all layers need not attend for the tokens without a row.

        Their results would be used by nobody. Not where a device has only some of the tokens.
        """
        is_last = len(self.layers) == self.config.num_hidden_layers
        return is_last and not layout.tokens and len(batch.logit_rows) < len(batch.token_ids)

    def fill_upper_cache(
        self, x: Array, rope: tuple[Array, Array], batch: ForwardBatch, cache: KVCache
    ) -> KVCache:
        """Write all tokens' keys and values of the upper layers, from `x [T, hidden]`; here none.

        `x` is what the lower layers give, complete on every device.
        """
        del x, rope, batch
        return cache

    def run_upper_layers(
        self, x: Array, batch: ForwardBatch, cache: KVCache, layout: MeshLayout
    ) -> Array:
        """`x [R, hidden]` of the rows that need logits to the input of the last norm; here none."""
        del batch, cache, layout
        return x

    def feed_forward(self, layer: int) -> FeedForward:
        """Make the feed-forward of a layer."""
        del layer
        return GatedMLP(self.config, self.num_devices)

    @staticmethod
    def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config of model type `llama` or `mistral`."""
        bias = bool(config.get("attention_bias", False))
        layers = int(config["num_hidden_layers"])
        window = config.get("sliding_window") if config.get("model_type") == "mistral" else None
        return ModelConfig.from_hf(
            config,
            qkv_bias=bias,
            attention_output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding_windows=(window,) * layers if window else (),
        )

    def weight_sources(self) -> dict[str, Source]:
        """Say, for each parameter's path, which checkpoint tensors it is read from."""
        config = self.config
        sources: dict[str, Source] = {
            "embed.weight": Rows("model.embed_tokens.weight"),
            "norm.weight": Rows("model.norm.weight"),
            "lm_head.weight": Rows("lm_head.weight"),
        }
        for i in range(config.num_lower_layers):
            sources |= self.layer_sources(f"layers.{i}", i)
        return sources

    def layer_sources(self, here: str, layer: int) -> dict[str, Source]:
        """Say the same of a layer, whose parameters' paths begin with `here`."""
        there = f"model.layers.{layer}"
        sources: dict[str, Source] = {
            f"{here}.attention_norm.weight": Rows(f"{there}.input_layernorm.weight"),
            f"{here}.mlp_norm.weight": Rows(f"{there}.post_attention_layernorm.weight"),
            f"{here}.attention.output": Columns(f"{there}.self_attn.o_proj.weight"),
            f"{here}.attention.output_bias": Rows(f"{there}.self_attn.o_proj.bias"),
            f"{here}.attention.q_norm.weight": Rows(f"{there}.self_attn.q_norm.weight"),
            f"{here}.attention.k_norm.weight": Rows(f"{there}.self_attn.k_norm.weight"),
        }
        for path, kind in (("qkv", "weight"), ("qkv_bias", "bias")):
            sources[f"{here}.attention.{path}"] = QKV(
                *(f"{there}.self_attn.{p}_proj.{kind}" for p in "qkv"),
                heads=self.config.num_attention_heads,
                kv_heads=self.config.num_key_value_heads,
                groups=self.num_kv_groups,
                head_dim=self.config.head_dim,
            )
        for path, source in self.feed_forward_sources(layer).items():
            sources[f"{here}.mlp.{path}"] = source
        return sources

    def feed_forward_sources(self, layer: int) -> dict[str, Source]:
        """Say the same of a layer's feed-forward; the paths are those inside of it."""
        there = f"model.layers.{layer}.mlp"
        gate_up = {
            kind: GateUp(f"{there}.gate_proj.{kind}", f"{there}.up_proj.{kind}", self.num_devices)
            for kind in ("weight", "bias")
        }
        return {
            "gate_up": gate_up["weight"],
            "gate_up_bias": gate_up["bias"],
            "down": Columns(f"{there}.down_proj.weight"),
            "down_bias": Rows(f"{there}.down_proj.bias"),
        }


def num_kv_groups(config: ModelConfig, num_devices: int) -> int:
    """Key/value heads in the cache: copies are made where devices outnumber them.

    Raises:
        ValueError: the heads cannot be split evenly; the message holds the numbers.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    groups = max(kv_heads, num_devices)
    if groups % kv_heads or groups % num_devices or heads % groups:
        raise ValueError(
            f"{heads} attention heads with {kv_heads} key/value heads cannot be split over "
            f"{num_devices} devices"
        )
    return groups
