"""Qwen3 (dense): Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arctic_jax.config import ModelConfig
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.models.qwen2 import sliding_windows


class Qwen3ForCausalLM(LlamaForCausalLM):
    """See the module."""

    @staticmethod
    def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config of model type `qwen3`."""
        bias = bool(config.get("attention_bias", False))
        return ModelConfig.from_hf(
            config,
            qkv_bias=bias,
            attention_output_bias=bias,
            qk_norm=True,
            sliding_windows=sliding_windows(config),
        )
