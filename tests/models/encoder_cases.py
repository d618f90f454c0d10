"""Tiny encoders, one a feature, as a Hugging Face `config.json` would hold them.

Used by `scripts/make_goldens.py`, which stores the hidden states of `transformers` for each, and by
the tests of the models. The weights are `arctic_jax.testing.write_checkpoint(directory, config,
SEED)`. Positions end where the longest prompt does: an offset too many would show.
"""

from typing import Any

SEED = 11
LENGTHS = (1, 2, 17, 40)
VOCAB_SIZE = 128


def _config(**changes: Any) -> dict[str, Any]:
    base = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "hidden_act": "gelu",
        "max_position_embeddings": 40,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    return base | changes


def _decoder(family: str, **changes: Any) -> dict[str, Any]:
    decoder = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    return _config(**decoder) | changes


CASES: dict[str, dict[str, Any]] = {
    "bert": _config(),
    "bert_one_head": _config(num_attention_heads=1, num_hidden_layers=1),
    "bert_tanh_gelu": _config(hidden_act="gelu_new"),
    "bert_relu": _config(hidden_act="relu", type_vocab_size=1),
    "bert_epsilon": _config(layer_norm_eps=1e-2, hidden_size=64, num_attention_heads=2),
    "roberta": _config(
        architectures=["RobertaModel"],
        model_type="roberta",
        max_position_embeddings=42,
        type_vocab_size=1,
        pad_token_id=1,
        layer_norm_eps=1e-5,
    ),
    "xlm_roberta": _config(
        architectures=["XLMRobertaModel"],
        model_type="xlm-roberta",
        max_position_embeddings=42,
        type_vocab_size=1,
        pad_token_id=1,
        layer_norm_eps=1e-5,
    ),
    "llama": _decoder("Llama", num_key_value_heads=6),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=16),
}
