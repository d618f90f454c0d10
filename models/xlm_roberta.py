"""XLM-RoBERTa (Conneau et al. 2020): snowflake-arctic-embed-l-v2.0, multilingual-e5, bge-m3.

BERT, except that a text's positions begin after the row of the padding token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from arctic_jax.models.bert import BertModel, EncoderConfig


class XLMRobertaModel(BertModel):
    """An encoder of texts in many languages."""

    prefixes: ClassVar[tuple[str, ...]] = ("", "roberta.")

    @staticmethod
    def config_from_hf(config: Mapping[str, Any]) -> EncoderConfig:
        """Read a Hugging Face config of model type `xlm-roberta` or `roberta`."""
        return EncoderConfig.from_hf(config, position_offset=int(config.get("pad_token_id", 1)) + 1)
