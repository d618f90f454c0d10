"""Qwen2 and Qwen2.5 with SwiftKV: biases on the projections of the upper layers, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arctic_jax.config import ModelConfig
from arctic_jax.models.llama_swiftkv import LlamaSwiftKVForCausalLM, with_swiftkv
from arctic_jax.models.qwen2 import Qwen2ForCausalLM


class Qwen2SwiftKVForCausalLM(LlamaSwiftKVForCausalLM):
    """See the module."""

    @staticmethod
    def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config of model type `qwen2_swiftkv`."""
        return with_swiftkv(Qwen2ForCausalLM.config_from_hf(config), config)
