"""The layers that decoders are built from. Pure; run inside the step program.

Every weight is stored with the dimension that is split over devices first: `[out, in]` for
column-parallel products, `[in, out]` for row-parallel ones. Which axis of the mesh that is, only
the `MeshLayout` knows; a module names the logical axis ("heads", "ffn", "vocab").
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from arctic_jax.batch import ForwardBatch
from arctic_jax.config import ModelConfig, RopeConfig
from arctic_jax.kv_cache import KVCache
from arctic_jax.pallas_kernels.add_rms_norm import add_rms_norm
from arctic_jax.pallas_kernels.add_rms_norm.reference import rms_norm
from arctic_jax.pallas_kernels.kv_cache_update import kv_cache_update
from arctic_jax.pallas_kernels.linear import linear
from arctic_jax.pallas_kernels.norm_linear import norm_linear
from arctic_jax.pallas_kernels.paged_attention import paged_attention
from arctic_jax.shift_parallel import MeshLayout

VOCAB_MULTIPLE = 64  # the vocabulary is padded to this many rows a device


def parameter(*shape: int, axis: str | None = None, dtype: Any = jnp.float32) -> nnx.Param[Array]:
    """Declare a parameter whose first dimension lies along a logical axis; filled by the loader.

    With weights in the type that it was told; integers, such as token ids, stay what they are.
    """
    return nnx.Param(jnp.zeros(shape, dtype), axis=axis)


def dtype_of(variable: nnx.Param[Array], weights: jnp.dtype) -> jnp.dtype:
    """Return the type that the loader gives a parameter where that of weights is `weights`."""
    return weights if jnp.issubdtype(variable.dtype, jnp.floating) else variable.dtype


def in_narrow_part(*modules: nnx.Module | None) -> None:
    """Split the parameters of modules over all devices, in every layout."""
    for variable in named_parameters(modules).values():
        if variable.get_metadata("axis"):
            variable.set_metadata("axis", "narrow")


def named_parameters(module: Any) -> dict[str, nnx.Param[Array]]:
    """Return the parameters by their dotted paths, in the order of `jax.tree.leaves(module)`."""
    found = jax.tree_util.tree_leaves_with_path(
        module, is_leaf=lambda node: isinstance(node, nnx.Param)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="."): p for path, p in found}


def rotary(rope: RopeConfig, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines `[T, head_dim/2]` of the angles at `positions [T]`, float32.

    Scaling: "linear" (Chen et al. 2023), "llama3" (Llama 3.1), "yarn" (Peng et al. 2023).
    """
    inverse, factor = _frequencies(rope, head_dim)
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(inverse)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of `x [..., heads, head_dim]` in the half-split order of Hugging Face.

    In float32, by `cos` and `sin [..., head_dim/2]`; for what `kv_cache_update` does not rotate.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Return inverse frequencies `[head_dim/2]` and the factor on cosines and sines."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    original = rope.original_max_position_embeddings
    if rope.type == "linear":
        return inverse / np.float32(rope.factor), 1.0
    if rope.type == "llama3":
        wavelength = 2 * math.pi / inverse
        smooth = original / wavelength - rope.low_freq_factor
        smooth = np.clip(smooth / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        scaled = (1 - smooth) * inverse / rope.factor + smooth * inverse
        return scaled.astype(np.float32), 1.0
    if rope.type == "yarn":

        def dimension(rotations: float) -> float:
            """Return the dimension that turns this often within the original context."""
            turns = math.log(original / (rotations * 2 * math.pi))
            return head_dim * turns / (2 * math.log(rope.theta))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (np.arange(head_dim // 2) - low) / max(high - low, 0.001)
        interpolated = np.clip(ramp, 0, 1)
        scaled = inverse / rope.factor * interpolated + inverse * (1 - interpolated)
        return scaled.astype(np.float32), _yarn_attention_factor(rope)
    return inverse, 1.0


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


class Embed(nnx.Module):
    """Token embedding `[vocab, hidden]`, split over the vocabulary; also the output projection."""

    def __init__(self, vocab_size: int, hidden_size: int, num_devices: int) -> None:
        multiple = VOCAB_MULTIPLE * num_devices
        self.vocab_size = vocab_size
        rows = -(-vocab_size // multiple) * multiple
        self.weight = parameter(rows, hidden_size, axis="vocab")

    def __call__(self, token_ids: Array, layout: MeshLayout) -> Array:
        """`[T]` token ids to `[T/SP, hidden]`."""
        weight = self.weight[...]
        local = token_ids - layout.vocab_shard() * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        rows = weight[jnp.clip(local, 0, weight.shape[0] - 1)]
        return layout.scatter_tokens(jnp.where(mine[:, None], rows, 0))

    def logits(self, x: Array, layout: MeshLayout) -> Array:
        """`[R, hidden]` to float32 logits `[R, vocab]`."""
        return layout.gather_vocab(self._local_logits(x))[:, : self.vocab_size]

    def likeliest(self, x: Array, layout: MeshLayout) -> Array:
        """`[R, hidden]` to the likeliest token of each row, `[R]`: logits stay where they are."""
        logits = self._local_logits(x)
        token_ids = layout.vocab_shard() * logits.shape[1] + jnp.arange(logits.shape[1])
        return layout.argmax_vocab(jnp.where(token_ids < self.vocab_size, logits, -jnp.inf))

    def _local_logits(self, x: Array) -> Array:
        product = functools.partial(jnp.einsum, "rd,vd->rv", preferred_element_type=jnp.float32)
        if len(x) > 1:
            return product(x, self.weight[...])
        # cuBLAS takes 1.25 ms for one row with 128,256 x 4,096 on an H200, the sum 0.25.
        return jax.lax.platform_dependent(
            x, self.weight[...], cuda=sum_of_products, default=product
        )


def sum_of_products(x: Array, weight: Array) -> Array:
    """`x [R, in]` times `weight [out, in]` in float32, without a matrix product: `[R, out]`."""
    return jnp.sum(x[:, None].astype(jnp.float32) * weight.astype(jnp.float32), axis=-1)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32."""

    def __init__(self, size: int, epsilon: float, implementation: str | None = None) -> None:
        self.weight = parameter(size)
        self.epsilon = epsilon
        self.implementation = implementation

    def __call__(self, x: Array) -> Array:
        """Normalise `x [..., size]`."""
        return rms_norm(x, self.weight[...], self.epsilon)

    def add(self, x: Array, delta: Array) -> tuple[Array, Array]:
        """`x + delta [T, size]`, and its normalisation."""
        return add_rms_norm(
            x,
            delta,
            self.weight[...],
            epsilon=self.epsilon,
            implementation=self.implementation,
        )

    def linear(
        self, x: Array, delta: Array, weight: Array, bias: Array | None, *, gated: bool = False
    ) -> tuple[Array, Array]:
        """`x + delta [T, size]`, and its normalisation times `weight [..., size]`."""
        return norm_linear(
            x,
            delta,
            self.weight[...],
            weight,
            bias,
            epsilon=self.epsilon,
            gated=gated,
            implementation=self.implementation,
        )


def row_parallel(
    x: Array, weight: Array, bias: Array | None, layout: MeshLayout, implementation: str | None
) -> Array:
    """Devices' parts of `x [tokens, in]` times those of `weight [in, out]`, summed, plus `bias`."""
    # The kernel is for few tokens; by its name it would refuse the others.
    implementation = "xla" if implementation == "xla" else None
    out = linear(x, weight, inputs_first=True, implementation=implementation)
    out = layout.reduce(out)
    return out if bias is None else out + bias


class PagedAttention(nnx.Module):
    """What all attention over the paged cache ends with: from rotated queries to the output."""

    def __init__(
        self, config: ModelConfig, sliding_window: int | None, implementation: str | None
    ) -> None:
        self.head_dim = config.head_dim
        self.sliding_window = sliding_window
        self.implementation = implementation
        size = config.num_attention_heads * config.head_dim
        self.output = parameter(size, config.hidden_size, axis="heads")
        self.output_bias = parameter(config.hidden_size) if config.attention_output_bias else None

    def attend(
        self, q: Array, batch: ForwardBatch, cache: KVCache, layer: Array, layout: MeshLayout
    ) -> Array:
        """Rotated queries `[tokens, heads, head_dim]` to what is added to the residual stream."""
        out = paged_attention(
            q,
            cache.k,
            cache.v,
            layer,
            batch.block_tables,
            batch.query_start_loc,
            batch.seq_lens,
            batch.draft_mask,
            max_query_len=batch.max_query_len,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            implementation=self.implementation,
        )
        out = layout.to_tokens(out.reshape(out.shape[0], cache.k.shape[2], -1))
        bias = None if self.output_bias is None else self.output_bias[...]
        out = out.reshape(out.shape[0], -1)
        return row_parallel(out, self.output[...], bias, layout, self.implementation)


class Attention(PagedAttention):
    """Grouped-query attention over the paged cache.

    Query, key and value projections are fused by key/value group: `[groups, w, hidden]` with
    `w = (heads/groups + 2) * head_dim`. There are as many groups as key/value heads, or as devices
    if those are more (then heads are copied).
    """

    def __init__(
        self,
        config: ModelConfig,
        sliding_window: int | None,
        groups: int,
        implementation: str | None,
    ) -> None:
        super().__init__(config, sliding_window, implementation)
        width = (config.num_attention_heads // groups + 2) * config.head_dim
        self.qkv = parameter(groups, width, config.hidden_size, axis="heads")
        self.qkv_bias = parameter(groups, width, axis="heads") if config.qkv_bias else None
        norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if norm else None

    def project(
        self,
        x: Array,
        delta: Array,
        norm: RMSNorm,
        rope: tuple[Array, Array],
        batch: ForwardBatch,
        cache: KVCache,
        layer: Array,
        layout: MeshLayout,
    ) -> tuple[Array, Array, KVCache]:
        """`x` and `delta [T/SP, hidden]` to their sum and the queries `[T, heads/P, head_dim]`.

        With the cache, into which the layer's keys and values have been written.
        """
        weight, bias = self.qkv[...], None if self.qkv_bias is None else self.qkv_bias[...]
        x, qkv = norm.linear(x, delta, weight, bias)
        qkv = layout.to_heads(qkv.reshape(-1, *weight.shape[:-1]))
        tokens, groups, _ = qkv.shape
        norms = {}
        if self.q_norm is not None and self.k_norm is not None:
            norms = {
                "q_norm": self.q_norm.weight[...][None],
                "k_norm": self.k_norm.weight[...][None],
                "epsilon": self.q_norm.epsilon,
            }
        q, k_cache, v_cache = kv_cache_update(
            qkv.reshape(tokens, groups, 1, -1, self.head_dim),
            *rope,
            cache.k,
            cache.v,
            layer,
            batch.slot_mapping,
            **norms,
            implementation=self.implementation,
        )
        return x, q, KVCache(k_cache, v_cache)


class GatedMLP(nnx.Module):
    """SwiGLU feed-forward. Gate and up are fused as `[shards, 2, ffn/shards, hidden]`.

    `shards` is the number of devices: so a device's part of the fused weight is one piece of memory
    in every layout, and its product holds gate and up side by side.

    Raises:
        ValueError: the feed-forward dimension cannot be split over the devices.
    """

    def __init__(self, config: ModelConfig, num_devices: int) -> None:
        if config.intermediate_size % num_devices:
            raise ValueError(
                f"intermediate_size {config.intermediate_size} cannot be split over "
                f"{num_devices} devices"
            )
        hidden, size = config.hidden_size, config.intermediate_size // num_devices
        self.gate_up = parameter(num_devices, 2, size, hidden, axis="ffn")
        self.down = parameter(config.intermediate_size, hidden, axis="ffn")
        bias = config.mlp_bias
        self.gate_up_bias = parameter(num_devices, 2, size, axis="ffn") if bias else None
        self.down_bias = parameter(hidden) if bias else None

    def __call__(
        self, x: Array, delta: Array, norm: RMSNorm, layout: MeshLayout
    ) -> tuple[Array, Array]:
        """`x` and `delta [T, hidden]` to their sum, and the feed-forward of its norm."""
        bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        x, activated = norm.linear(x, delta, self.gate_up[...], bias, gated=True)
        bias = None if self.down_bias is None else self.down_bias[...]
        return x, row_parallel(activated, self.down[...], bias, layout, norm.implementation)
