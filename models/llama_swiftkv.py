"""SwiftKV (Qiao et al. 2024, arXiv 2410.03960): prompt tokens leave the model half way.

Pure; runs inside the step program. The keys and values of all upper layers come from one place, the
output of the last lower layer (SingleInputKV), and neighbouring layers may share them (AcrossKV).
So the upper layers run only on the rows whose logits are wanted. What differs from `llama.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from arctic_jax.batch import ForwardBatch
from arctic_jax.config import ModelConfig, SwiftKVConfig
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.kv_cache import KVCache
from arctic_jax.models.layers import (
    PagedAttention,
    RMSNorm,
    in_narrow_part,
    parameter,
    rotary,
    rotate,
)
from arctic_jax.models.llama import FeedForward, LlamaForCausalLM
from arctic_jax.pallas_kernels.kv_cache_update import kv_cache_update
from arctic_jax.pallas_kernels.linear import linear
from arctic_jax.shift_parallel import MeshLayout
from arctic_jax.weights import KV, Rows, Source


class QueryAttention(PagedAttention):
    """Attention whose keys and values are in the cache already: it projects queries alone."""

    def __init__(
        self, config: ModelConfig, sliding_window: int | None, implementation: str | None
    ) -> None:
        super().__init__(config, sliding_window, implementation)
        size = config.num_attention_heads * config.head_dim
        self.query = parameter(size, config.hidden_size, axis="heads")
        self.query_bias = parameter(size, axis="heads") if config.qkv_bias else None

    def __call__(
        self,
        x: Array,
        delta: Array,
        norm: RMSNorm,
        rope: tuple[Array, Array],
        batch: ForwardBatch,
        cache: KVCache,
        layer: Array,
        layout: MeshLayout,
    ) -> tuple[Array, Array]:
        """`x` and `delta [R, hidden]` to their sum and the attention of its norm."""
        bias = None if self.query_bias is None else self.query_bias[...]
        x, q = norm.linear(x, delta, self.query[...], bias)
        q = rotate(q.reshape(len(q), -1, self.head_dim), *rope)
        return x, self.attend(q, batch, cache, layer, layout)


class UpperLayer(nnx.Module):
    """A decoder layer for the few rows of the narrowed batch. It only reads the cache."""

    def __init__(
        self,
        config: ModelConfig,
        sliding_window: int | None,
        mlp: FeedForward,
        implementation: str | None,
    ) -> None:
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(size, epsilon, implementation)
        self.attention = QueryAttention(config, sliding_window, implementation)
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
    ) -> tuple[Array, Array]:
        """`x` and `delta [R, hidden]` of this layer to those of the next."""
        x, delta = self.attention(x, delta, self.attention_norm, rope, batch, cache, layer, layout)
        return self.mlp(x, delta, self.mlp_norm, layout)


_run_layer = jax.jit(UpperLayer.__call__)  # as in llama.py


class UpperKeysValues(nnx.Module):
    """Keys and values of all upper layers that own some: one norm, one product, one cache write.

    The product's weight is `[groups, layers, 2 * head_dim, hidden]`, what `kv_cache_update` takes.
    """

    def __init__(self, config: ModelConfig, groups: int, implementation: str | None) -> None:
        layers = config.num_cache_layers - config.num_lower_layers
        shape = (groups, layers, 2 * config.head_dim)
        self.head_dim = config.head_dim
        self.implementation = implementation
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.weight = parameter(*shape, config.hidden_size, axis="heads")
        self.bias = parameter(*shape, axis="heads") if config.qkv_bias else None

    def __call__(
        self, x: Array, rope: tuple[Array, Array], batch: ForwardBatch, cache: KVCache
    ) -> KVCache:
        """Write those of `x [T, hidden]` to the upper layers' caches: the last ones."""
        groups, layers, _, _ = self.weight.shape
        bias = None if self.bias is None else self.bias[...]
        kv = linear(self.norm(x), self.weight[...], bias, gated=False)
        _, k, v = kv_cache_update(
            kv.reshape(-1, groups, layers, 2, self.head_dim),
            *rope,
            cache.k,
            cache.v,
            jnp.int32(cache.k.shape[0] - layers),
            batch.slot_mapping,
            implementation=self.implementation,
        )
        return KVCache(k, v)


class LlamaSwiftKVForCausalLM(LlamaForCausalLM):
    """See the module. Without upper layers (l = L) it is the ordinary model.

    The upper layers, where rows are few, split their heads over all devices in every layout.
    """

    def __init__(
        self, config: ModelConfig, num_devices: int, implementation: str | None = None
    ) -> None:
        super().__init__(config, num_devices, implementation)
        self.upper_layers = nnx.List(
            [
                UpperLayer(config, config.sliding_window(i), self.feed_forward(i), implementation)
                for i in range(config.num_lower_layers, config.num_hidden_layers)
            ]
        )
        self.upper_kv = (
            UpperKeysValues(config, self.num_kv_groups, implementation)
            if self.upper_layers
            else None
        )
        in_narrow_part(self.upper_layers, self.upper_kv)

    def fill_upper_cache(
        self, x: Array, rope: tuple[Array, Array], batch: ForwardBatch, cache: KVCache
    ) -> KVCache:
        """See `LlamaForCausalLM`: the keys and values of every upper layer, all at once."""
        return self.upper_kv(x, rope, batch, cache) if self.upper_kv else cache

    def run_upper_layers(
        self, x: Array, batch: ForwardBatch, cache: KVCache, layout: MeshLayout
    ) -> Array:
        """See `LlamaForCausalLM`: from `x [R, hidden]` of the last lower layer on."""
        rope = rotary(self.config.rope, self.config.head_dim, batch.positions)
        delta = jnp.zeros_like(x)
        for i, layer in enumerate(self.upper_layers):
            owner = self.config.num_lower_layers + i // self.config.key_value_group_size
            x, delta = _run_layer(
                layer, x, delta, rope, batch, cache, np.int32(owner), layout=layout
            )
        return x + delta

    @staticmethod
    def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config of model type `llama_swiftkv`."""
        return with_swiftkv(LlamaForCausalLM.config_from_hf(config), config)

    def weight_sources(self) -> dict[str, Source]:
        """Say, for each parameter's path, which checkpoint tensors it is read from."""
        config, lower = self.config, self.config.num_lower_layers
        sources = super().weight_sources()
        sources["upper_kv.norm.weight"] = Rows("model.norm_swiftkv.weight")
        owners = [
            f"model.layers.{i}.self_attn"
            for i in range(lower, config.num_hidden_layers, config.key_value_group_size)
        ]
        for kind in ("weight", "bias"):
            sources[f"upper_kv.{kind}"] = KV(
                tuple(f"{there}.k_proj_swiftkv.{kind}" for there in owners),
                tuple(f"{there}.v_proj_swiftkv.{kind}" for there in owners),
                kv_heads=config.num_key_value_heads,
                groups=self.num_kv_groups,
                head_dim=config.head_dim,
            )
        for i in range(lower, config.num_hidden_layers):
            here, query = f"upper_layers.{i - lower}", f"model.layers.{i}.self_attn.q_proj_swiftkv"
            sources |= self.layer_sources(here, i)
            sources[f"{here}.attention.query"] = Rows(f"{query}.weight")
            sources[f"{here}.attention.query_bias"] = Rows(f"{query}.bias")
        return sources


def with_swiftkv(model: ModelConfig, config: Mapping[str, Any]) -> ModelConfig:
    """Add to a base model's numbers those of SwiftKV; by default there are no upper layers.

    Raises:
        UnsupportedModelError: the numbers do not fit each other; the message holds them.
    """
    layers = model.num_hidden_layers
    lower = config.get("num_key_value_layers")
    lower = layers if lower is None else int(lower)
    size = int(config.get("key_value_group_size") or 1)
    if not 1 <= lower <= layers:
        raise UnsupportedModelError(
            f"num_key_value_layers {lower} is not between 1 and num_hidden_layers {layers}"
        )
    if size < 1 or (layers - lower) % size:
        raise UnsupportedModelError(
            f"num_hidden_layers {layers} - num_key_value_layers {lower} = {layers - lower} is not "
            f"a multiple of key_value_group_size {size}"
        )
    return replace(model, swiftkv=SwiftKVConfig(lower, size))
