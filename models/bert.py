"""BERT (Devlin et al. 2018): MiniLM, snowflake-arctic-embed xs/s/m and m-v1.5, e5, bge.

Pure; runs inside the encoder program. An encoder keeps no cache and has no phases: one pass over a
packed batch, from token ids to the hidden states that are pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
from flax import nnx
from jax import Array

from arctic_jax.encoder_batch import EncoderBatch
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.models.layers import parameter
from arctic_jax.pallas_kernels.add_layer_norm import add_layer_norm
from arctic_jax.pallas_kernels.gelu import gelu
from arctic_jax.pallas_kernels.linear_gelu import linear_gelu
from arctic_jax.pallas_kernels.segment_attention import segment_attention
from arctic_jax.weights import Rows, Source, Transposed

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,  # by the error function
    "gelu_new": partial(jax.nn.gelu, approximate=True),  # by tanh, as is the next
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class EncoderConfig:
    """The numbers of an encoder.

    Attributes:
        position_offset: row of the position embedding that belongs to a text's first token.
        max_positions: tokens of the longest text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_positions: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    position_offset: int = 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], position_offset: int = 0) -> EncoderConfig:
        """Read a Hugging Face `config.json`; ignore unknown keys.

        Raises:
            UnsupportedModelError: a key is missing, or has a value that is not implemented.
        """
        activation = config.get("hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"hidden_act {activation!r} is not supported; supported: {sorted(ACTIVATIONS)}"
            )
        kind = config.get("position_embedding_type", "absolute")
        if kind != "absolute":
            raise UnsupportedModelError(f"position_embedding_type {kind!r} is not supported")
        if config.get("is_decoder"):
            raise UnsupportedModelError("is_decoder is not supported by an encoder")
        try:
            values = cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_hidden_layers=int(config["num_hidden_layers"]),
                num_attention_heads=int(config["num_attention_heads"]),
                max_positions=int(config["max_position_embeddings"]) - position_offset,
                type_vocab_size=int(config.get("type_vocab_size", 2)),
                layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
                hidden_act=activation,
                position_offset=position_offset,
            )
        except KeyError as error:
            raise UnsupportedModelError(f"the model's config has no key {error}") from error
        if values.hidden_size % values.num_attention_heads:
            raise UnsupportedModelError(
                f"hidden_size {values.hidden_size} is not a multiple of "
                f"num_attention_heads {values.num_attention_heads}"
            )
        return values

    @property
    def head_dim(self) -> int:
        """Numbers of a query."""
        return self.hidden_size // self.num_attention_heads

    @property
    def usual_length(self) -> int:
        """Tokens of the longest text if nothing else is said."""
        return self.max_positions


class LayerNorm(nnx.Module):
    """Layer normalisation (Ba et al. 2016) over the last dimension, computed in float32."""

    def __init__(self, size: int, epsilon: float, implementation: str | None = None) -> None:
        self.weight = parameter(size)
        self.bias = parameter(size)
        self.epsilon = epsilon
        self.implementation = implementation

    def __call__(self, x: Array, delta: Array, delta_bias: Array) -> Array:
        """Normalise the sum of two arrays `[T, size]` and one `[size]`."""
        return add_layer_norm(
            x,
            delta,
            delta_bias,
            self.weight[...],
            self.bias[...],
            epsilon=self.epsilon,
            implementation=self.implementation,
        )


class Linear(nnx.Module):
    """A product, its weight `[in, out]`: on CPUs the faster order for few tokens; and a bias."""

    def __init__(self, in_size: int, out_size: int) -> None:
        self.weight = parameter(in_size, out_size)
        self.bias = parameter(out_size)

    def __call__(self, x: Array) -> Array:
        """`[T, in]` to `[T, out]`."""
        return self.product(x) + self.bias[...]

    def product(self, x: Array) -> Array:
        """`[T, in]` to `[T, out]` for a caller who adds the bias."""
        return x @ self.weight[...]


class EncoderLayer(nnx.Module):
    """Attention and feed-forward, each with a residual around it and a norm after."""

    def __init__(self, config: EncoderConfig, implementation: str | None) -> None:
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        self.implementation = implementation
        self.qkv = Linear(hidden, 3 * hidden)
        self.output = Linear(hidden, hidden)
        self.attention_norm = LayerNorm(hidden, config.layer_norm_eps, implementation)
        self.up = Linear(hidden, config.intermediate_size)
        self.down = Linear(config.intermediate_size, hidden)
        self.mlp_norm = LayerNorm(hidden, config.layer_norm_eps, implementation)

    def __call__(self, x: Array, bounds: Array, window: int) -> Array:
        """`x [T, hidden]` of this layer to that of the next."""
        tokens, hidden = x.shape
        attended = segment_attention(
            self.qkv(x).reshape(tokens, 3 * self.num_heads, hidden // self.num_heads),
            bounds,
            num_kv_heads=self.num_heads,
            window=window,
            scale=(hidden // self.num_heads) ** -0.5,
            implementation=self.implementation,
        )
        projected = self.output.product(attended.reshape(tokens, hidden))
        x = self.attention_norm(x, projected, self.output.bias[...])
        return self.mlp_norm(x, self.down.product(self._widened(x)), self.down.bias[...])

    def _widened(self, x: Array) -> Array:
        """Return `[T, intermediate]`, what the feed-forward has between its two products."""
        if self.activation is not gelu:
            return self.activation(self.up(x))
        weight, bias = self.up.weight[...], self.up.bias[...]
        return linear_gelu(x, weight, bias, implementation=self.implementation)


# Equal layers are traced and lowered once: the program calls one function with other weights.
_run_layer = jax.jit(EncoderLayer.__call__, static_argnames="window")


class BertModel(nnx.Module):
    """An encoder of texts.

    Args:
        config: its numbers.
        implementation: of every operation, see `pallas_kernels.dispatch`.
    """

    first_tensor: ClassVar[str] = "embeddings.word_embeddings.weight"
    prefixes: ClassVar[tuple[str, ...]] = ("", "bert.")
    """What may stand before the names of a checkpoint's tensors; the first is that of our names."""

    def __init__(self, config: EncoderConfig, implementation: str | None = None) -> None:
        hidden = config.hidden_size
        self.config = config
        self.words = parameter(config.vocab_size, hidden)
        self.positions = parameter(config.max_positions + config.position_offset, hidden)
        self.types = parameter(config.type_vocab_size, hidden)
        self.norm = LayerNorm(hidden, config.layer_norm_eps, implementation)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([EncoderLayer(config, implementation) for _ in layers])

    def __call__(self, batch: EncoderBatch, window: int) -> Array:
        """Return the hidden states `[T, hidden]` of the last layer.

        Args:
            batch: the sequences.
            window: tokens of a window, see `EncoderBucket`.
        """
        positions = batch.positions + self.config.position_offset
        words, places = self.words[...][batch.token_ids], self.positions[...][positions]
        x = self.norm(words, places, self.types[...][0])  # a text alone is all of the first type
        bounds = batch.bounds
        for layer in self.layers:
            x = _run_layer(layer, x, bounds, window=window)
        return x

    @staticmethod
    def config_from_hf(config: Mapping[str, Any]) -> EncoderConfig:
        """Read a Hugging Face config of model type `bert`."""
        return EncoderConfig.from_hf(config)

    def weight_sources(self) -> dict[str, Source]:
        """Say, for each parameter's path, which checkpoint tensors it is read from."""
        sources: dict[str, Source] = {
            "words": Rows("embeddings.word_embeddings.weight"),
            "positions": Rows("embeddings.position_embeddings.weight"),
            "types": Rows("embeddings.token_type_embeddings.weight"),
            "norm.weight": Rows("embeddings.LayerNorm.weight"),
            "norm.bias": Rows("embeddings.LayerNorm.bias"),
        }
        for i in range(self.config.num_hidden_layers):
            here, there = f"layers.{i}", f"encoder.layer.{i}"
            for ours, theirs in (
                ("attention_norm", "attention.output.LayerNorm"),
                ("mlp_norm", "output.LayerNorm"),
            ):
                for kind in ("weight", "bias"):
                    sources[f"{here}.{ours}.{kind}"] = Rows(f"{there}.{theirs}.{kind}")
            for ours, theirs in (
                ("qkv", tuple(f"attention.self.{p}" for p in ("query", "key", "value"))),
                ("output", ("attention.output.dense",)),
                ("up", ("intermediate.dense",)),
                ("down", ("output.dense",)),
            ):
                for kind in ("weight", "bias"):
                    names = tuple(f"{there}.{name}.{kind}" for name in theirs)
                    sources[f"{here}.{ours}.{kind}"] = Transposed(names)
        return sources
