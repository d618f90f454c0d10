"""Which class serves which architecture. A new model is one file and one row here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_jax.errors import UnsupportedModelError

if TYPE_CHECKING:
    from arctic_jax.models.bert import BertModel
    from arctic_jax.models.decoder_encoder import DecoderEncoder
    from arctic_jax.models.llama import LlamaForCausalLM
    from arctic_jax.models.lstm_speculator import ArcticLSTMSpeculator
    from arctic_jax.models.mlp_speculator import MLPSpeculator

ARCHITECTURES = {
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
    "MistralForCausalLM": "llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "qwen3_moe:Qwen3MoeForCausalLM",
    "LlamaSwiftKVForCausalLM": "llama_swiftkv:LlamaSwiftKVForCausalLM",
    "Qwen2SwiftKVForCausalLM": "qwen2_swiftkv:Qwen2SwiftKVForCausalLM",
}

ENCODERS = {
    "BertModel": "bert:BertModel",
    "BertForMaskedLM": "bert:BertModel",
    "RobertaModel": "xlm_roberta:XLMRobertaModel",
    "XLMRobertaModel": "xlm_roberta:XLMRobertaModel",
    "XLMRobertaForMaskedLM": "xlm_roberta:XLMRobertaModel",
    "LlamaForCausalLM": "decoder_encoder:LlamaEncoder",
    "MistralForCausalLM": "decoder_encoder:LlamaEncoder",
    "Qwen2ForCausalLM": "decoder_encoder:Qwen2Encoder",
    "Qwen3ForCausalLM": "decoder_encoder:Qwen3Encoder",
}
"""Models that turn a text into a vector. Decoders do where their files say so, see `is_encoder`."""

SPECULATORS = {
    "ArcticLSTMSpeculatorPreTrainedModel": "lstm_speculator:ArcticLSTMSpeculator",
    "MLPVariantSpeculatorPreTrainedModel": "lstm_speculator:ArcticLSTMSpeculator",
    "ArcticMLPSpeculatorPreTrainedModel": "mlp_speculator:MLPSpeculator",
    "MLPSpeculatorPreTrainedModel": "mlp_speculator:MLPSpeculator",
}
"""Networks that guess what a model beside them will say."""


def model_class(config: Mapping[str, Any]) -> type[LlamaForCausalLM]:
    """Return the class for a Hugging Face config, importing only its module.

    Raises:
        UnsupportedModelError: no row for any of the config's `architectures`.
    """
    return _find(config, ARCHITECTURES, ARCHITECTURES | ENCODERS)


def is_encoder(config: Mapping[str, Any], directory: Path | None) -> bool:
    """Whether a model is for vectors: it has no other use, or `modules.json` lies beside it.

    Args:
        config: its Hugging Face config.
        directory: with its files, if it is a directory.
    """
    names = config.get("architectures") or []
    if directory is not None and (directory / "modules.json").is_file():
        return True
    return any(name in ENCODERS and name not in ARCHITECTURES for name in names)


def encoder_class(config: Mapping[str, Any]) -> type[BertModel | DecoderEncoder]:
    """Return the encoder for a Hugging Face config, importing only its module.

    Raises:
        UnsupportedModelError: no row for any of the config's `architectures`.
    """
    return _find(config, ENCODERS, ARCHITECTURES | ENCODERS)


def speculator_class(config: Mapping[str, Any]) -> type[ArcticLSTMSpeculator | MLPSpeculator]:
    """Return the speculator for a Hugging Face config, importing only its module.

    Raises:
        UnsupportedModelError: no row for any of the config's `architectures`.
    """
    return _find(config, SPECULATORS, SPECULATORS)


def _find(config: Mapping[str, Any], table: Mapping[str, str], like: Mapping[str, str]) -> Any:
    names = config.get("architectures") or []
    for name in names:
        if name in table:
            module, _, cls = table[name].partition(":")
            return getattr(importlib.import_module(f"arctic_jax.models.{module}"), cls)
    raise UnsupportedModelError(
        f"architectures {names} are not supported; supported: {sorted(like)}"
    )
