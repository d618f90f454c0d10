"""Qwen3 with a mixture of experts in all or some layers (Qwen3-30B-A3B, Qwen3-235B-A22B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arctic_jax.config import ModelConfig, MoEConfig
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.models.llama import FeedForward, LlamaForCausalLM
from arctic_jax.models.moe import MoE
from arctic_jax.weights import Experts, Rows, Source


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """See the module.

    Raises:
        ValueError: as `LlamaForCausalLM`, and when the experts cannot be split over the devices.
    """

    def feed_forward(self, layer: int) -> FeedForward:
        """Make the mixture of a layer, or the dense feed-forward of one that has none."""
        moe = self.config.moe
        if moe is None or layer not in moe.layers:
            return super().feed_forward(layer)
        return MoE(self.config.hidden_size, moe, self.num_devices, self.implementation)

    def feed_forward_sources(self, layer: int) -> dict[str, Source]:
        """Say from which tensors a layer's feed-forward is read: one for each expert's matrix."""
        moe = self.config.moe
        if moe is None or layer not in moe.layers:
            return super().feed_forward_sources(layer)
        there = f"model.layers.{layer}.mlp"
        gate, up, down = (f"{there}.experts.{{}}.{p}_proj.weight" for p in ("gate", "up", "down"))
        return {
            "router": Rows(f"{there}.gate.weight"),
            "gate_up": Experts((gate, up), moe.num_experts),
            "down": Experts((down,), moe.num_experts),
        }

    @staticmethod
    def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config of model type `qwen3_moe`.

        Raises:
            UnsupportedModelError: as `ModelConfig.from_hf`, and for numbers of experts that are
                missing or impossible.
        """
        bias, layers = bool(config.get("attention_bias", False)), int(config["num_hidden_layers"])
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        return ModelConfig.from_hf(
            config,
            qkv_bias=bias,
            attention_output_bias=bias,
            qk_norm=True,
            sliding_windows=(window,) * layers if window else (),
            moe=_moe_from_hf(config, layers),
        )


def _moe_from_hf(config: Mapping[str, Any], layers: int) -> MoEConfig | None:
    # Published files have the first name, transformers 5 writes the second.
    num_experts = config.get("num_experts", config.get("num_local_experts"))
    if num_experts is None:
        raise UnsupportedModelError("the model's config has no key 'num_experts'")
    if num_experts == 0:
        return None
    for key in ("shared_expert_intermediate_size", "n_shared_experts", "n_group"):
        if config.get(key):
            raise UnsupportedModelError(f"{key} {config[key]} is not supported")
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or ()
    if step < 1:
        raise UnsupportedModelError(f"decoder_sparse_step {step} is less than 1")
    try:
        return MoEConfig(
            num_experts=int(num_experts),
            num_experts_per_tok=int(config["num_experts_per_tok"]),
            intermediate_size=int(config["moe_intermediate_size"]),
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),
            layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
        )
    except KeyError as error:
        raise UnsupportedModelError(f"the model's config has no key {error}") from error
