"""Decoders that embed texts: Qwen3-Embedding, and what is built like it on Llama and Qwen2.

Pure; runs inside the encoder program. The layers are those of the decoder's own file; here they run
over whole texts in a packed batch, without a cache, and a text's last token is what is pooled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from arctic_jax.config import ModelConfig
from arctic_jax.encoder_batch import EncoderBatch
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.models.layers import RMSNorm, rotary, rotate
from arctic_jax.models.llama import DecoderLayer, LlamaForCausalLM
from arctic_jax.models.qwen2 import Qwen2ForCausalLM
from arctic_jax.models.qwen3 import Qwen3ForCausalLM
from arctic_jax.pallas_kernels.segment_attention import segment_attention
from arctic_jax.shift_parallel import ALONE
from arctic_jax.weights import Source

MAX_LENGTH = 8192
"""Tokens of the longest text, unless the user or the model says something else: in XLA, attention
holds the scores of a whole window."""


@dataclass(frozen=True)
class DecoderEncoderConfig:
    """The numbers of a decoder, as `EncoderConfig` has those of an encoder."""

    decoder: ModelConfig

    @property
    def hidden_size(self) -> int:
        """Numbers of a vector."""
        return self.decoder.hidden_size

    @property
    def head_dim(self) -> int:
        """Numbers of a query."""
        return self.decoder.head_dim

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return self.decoder.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.decoder.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text that the decoder was made for."""
        return self.decoder.max_position_embeddings

    @property
    def usual_length(self) -> int:
        """Tokens of the longest text if nothing else is said."""
        return min(self.max_positions, MAX_LENGTH)


class DecoderEncoder(nnx.Module):
    """A decoder as an encoder of texts; subclasses name it.

    Args:
        config: its numbers.
        implementation: of every operation, see `pallas_kernels.dispatch`.

    Raises:
        UnsupportedModelError: it has sliding windows.
    """

    decoder_class: ClassVar[type[LlamaForCausalLM]]
    first_tensor: ClassVar[str] = "embed_tokens.weight"
    prefixes: ClassVar[tuple[str, ...]] = ("model.", "")
    """What may stand before the names of a checkpoint's tensors; the first is that of our names."""

    def __init__(self, config: DecoderEncoderConfig, implementation: str | None = None) -> None:
        self.config = config
        decoder = replace(config.decoder, tie_word_embeddings=True)  # no output projection
        if any(decoder.sliding_window(i) for i in range(decoder.num_hidden_layers)):
            raise UnsupportedModelError("an embedding model with sliding windows")
        self.decoder = self.decoder_class(decoder, 1, implementation)
        self.implementation = implementation

    def __call__(self, batch: EncoderBatch, window: int) -> Array:
        """Return what comes out of the last norm, `[T, hidden]`.

        Args:
            batch: the sequences.
            window: tokens of a window, see `EncoderBucket`.
        """
        numbers = self.decoder.config
        rope = rotary(numbers.rope, numbers.head_dim, batch.positions)
        x = self.decoder.embed(batch.token_ids, ALONE)
        delta, bounds = jnp.zeros_like(x), batch.bounds
        for layer in self.decoder.layers:
            x, delta = _run_layer(layer, x, delta, rope, bounds, window, self.implementation)
        return self.decoder.norm(x + delta)

    @classmethod
    def config_from_hf(cls, config: Mapping[str, Any]) -> DecoderEncoderConfig:
        """Read the decoder's Hugging Face config."""
        return DecoderEncoderConfig(cls.decoder_class.config_from_hf(config))

    def weight_sources(self) -> dict[str, Source]:
        """Say, for each parameter's path, which checkpoint tensors it is read from."""
        sources = self.decoder.weight_sources()
        return {f"decoder.{path}": source for path, source in sources.items()}


class LlamaEncoder(DecoderEncoder):
    """See the module."""

    decoder_class = LlamaForCausalLM


class Qwen2Encoder(DecoderEncoder):
    """See the module."""

    decoder_class = Qwen2ForCausalLM


class Qwen3Encoder(DecoderEncoder):
    """See the module."""

    decoder_class = Qwen3ForCausalLM


def _layer(
    layer: DecoderLayer,
    x: Array,
    delta: Array,
    rope: tuple[Array, Array],
    bounds: Array,
    window: int,
    implementation: str | None,
) -> tuple[Array, Array]:
    """`x` and `delta [T, hidden]` of this layer to those of the next."""
    attention, size = layer.attention, layer.attention.head_dim
    bias = None if attention.qkv_bias is None else attention.qkv_bias[...]
    x, qkv = layer.attention_norm.linear(x, delta, attention.qkv[...], bias)
    qkv = qkv.reshape(len(x), attention.qkv.shape[0], -1, size)  # by group: queries, key, value
    q, k, v = qkv[:, :, :-2].reshape(len(x), -1, size), qkv[:, :, -2], qkv[:, :, -1]
    q, k = _normed(q, attention.q_norm), _normed(k, attention.k_norm)
    attended = segment_attention(
        jnp.concatenate([rotate(q, *rope), rotate(k, *rope), v], axis=1),
        bounds,
        num_kv_heads=v.shape[1],
        window=window,
        scale=size**-0.5,
        causal=True,
        implementation=implementation,
    )
    delta = attended.reshape(len(x), -1) @ attention.output[...]
    if attention.output_bias is not None:
        delta = delta + attention.output_bias[...]
    return layer.mlp(x, delta, layer.mlp_norm, ALONE)


# Equal layers are traced and lowered once: the program calls one function with other weights.
_run_layer = jax.jit(_layer, static_argnums=(5, 6))


def _normed(heads: Array, norm: RMSNorm | None) -> Array:
    return heads if norm is None else norm(heads)
