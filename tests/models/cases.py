"""Tiny configs, one a feature, as a Hugging Face `config.json` would hold them.

Used by `scripts/make_goldens.py`, which stores the logits of `transformers` for each, and by the
tests of the models. The weights are `arctic_jax.testing.write_checkpoint(directory, config, SEED)`.
Scaled rotary embeddings have an original length of 16 and prompts of 48 tokens, sliding windows
hold 16 keys: each feature acts on most of a prompt.
"""

from typing import Any

SEED = 7
PROMPT_TOKENS = 48
VOCAB_SIZE = 128


def _config(architecture: str, **changes: Any) -> dict[str, Any]:
    base = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return base | changes


_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
_HEAD_32 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# As transformers 5 writes it: the base inside. The others are as most published files have it.
_NEW_YARN = {"rope_parameters": {**_YARN, "rope_theta": 1000000.0}}

CASES: dict[str, dict[str, Any]] = {
    "llama_gqa": _config("Llama"),
    "llama_mha_tied": _config("Llama", num_key_value_heads=6, tie_word_embeddings=True),
    "llama_mqa": _config("Llama", num_key_value_heads=1),
    "llama_head_dim": _config("Llama", **_HEAD_32),
    "llama_attention_bias": _config("Llama", attention_bias=True),
    "llama_mlp_bias": _config("Llama", mlp_bias=True),
    "llama_rope_linear": _config("Llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_rope_llama3": _config("Llama", **_HEAD_32, rope_scaling=_LLAMA3),
    "llama_rope_yarn": _config("Llama", **_HEAD_32, rope_scaling=_YARN),
    "llama_rope_yarn_options": _config(
        "Llama",
        **_HEAD_32,
        rope_scaling=_YARN
        | {"beta_fast": 2.0, "beta_slow": 0.5, "attention_factor": 1.3, "truncate": False},
    ),
    "mistral_full": _config("Mistral", sliding_window=None, head_dim=16),
    "mistral_sliding_window": _config("Mistral", sliding_window=16),
    "qwen2_gqa": _config("Qwen2", use_sliding_window=False, sliding_window=16),
    "qwen2_tied": _config("Qwen2", tie_word_embeddings=True, rope_theta=1000000.0),
    "qwen2_sliding_window": _config(
        "Qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen2_layer_types": _config(
        "Qwen2",
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2_rope_yarn": _config("Qwen2", **_HEAD_32, rope_theta=1000000.0, rope_scaling=_YARN),
    "qwen3_gqa": _config("Qwen3", **_HEAD_32, rope_theta=1000000.0),
    "qwen3_mqa_tied": _config(
        "Qwen3", num_key_value_heads=1, head_dim=16, tie_word_embeddings=True
    ),
    "qwen3_attention_bias": _config("Qwen3", head_dim=8, attention_bias=True),
    "qwen3_sliding_window": _config(
        "Qwen3", head_dim=8, use_sliding_window=True, sliding_window=16, max_window_layers=2
    ),
    "qwen3_rope_yarn": _config("Qwen3", **_HEAD_32, **_NEW_YARN),
    "qwen3_moe": _config("Qwen3Moe", **_QWEN3_MOE),
    "qwen3_moe_dense_layers": _config(
        "Qwen3Moe",
        **_QWEN3_MOE | {"norm_topk_prob": False, "num_hidden_layers": 4},
        decoder_sparse_step=2,
        mlp_only_layers=[1],
    ),
    "qwen3_moe_sliding_window": _config(
        "Qwen3Moe", **_QWEN3_MOE, use_sliding_window=True, sliding_window=16
    ),
}
