"""Qwen2 and Qwen2.5: Llama with biases on query, key and value and, at will, sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arctic_jax.config import ModelConfig
from arctic_jax.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """See the module."""

    @staticmethod
    def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config of model type `qwen2`."""
        return ModelConfig.from_hf(config, qkv_bias=True, sliding_windows=sliding_windows(config))


def sliding_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return each layer's window: `layer_types` decides, else the layers from a certain one on."""
    window, layers = config.get("sliding_window"), int(config["num_hidden_layers"])
    if not config.get("use_sliding_window") or not window:
        return ()
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = int(config.get("max_window_layers", layers))
    return tuple(window if i >= first else None for i in range(layers))
