"""A decoder without cache, batch or chunks, in float64 numpy: what the engine must agree with.

Written from the models' papers and configs, not from `models/`: it shares no line with them.
"""

from collections.abc import Mapping

import numpy as np

Tensors = Mapping[str, np.ndarray]


def logits(config: Mapping, tensors: Tensors, token_ids: list[int]) -> np.ndarray:
    """Logits `[tokens, vocab]` of a Llama-like model; `tensors` by their checkpoint names."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    dim = config.get("head_dim") or config["hidden_size"] // heads
    eps = config["rms_norm_eps"]
    n = len(token_ids)
    positions = np.arange(n)
    frequencies = config.get("rope_theta", 10000.0) ** (-np.arange(0, dim, 2) / dim)
    angles = positions[:, None] * frequencies
    visible = positions[None, :] <= positions[:, None]
    if config.get("sliding_window"):
        visible &= positions[None, :] > positions[:, None] - config["sliding_window"]

    def get(name: str) -> np.ndarray:
        return np.asarray(tensors[name], np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * get(name)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        bias = get(f"{name}.bias") if f"{name}.bias" in tensors else 0
        return x @ get(f"{name}.weight").T + bias

    def rope(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = get("model.embed_tokens.weight")[token_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm.weight")
        q = linear(h, f"{layer}.self_attn.q_proj").reshape(n, heads, dim)
        k = linear(h, f"{layer}.self_attn.k_proj").reshape(n, kv_heads, dim)
        v = linear(h, f"{layer}.self_attn.v_proj").reshape(n, kv_heads, dim)
        if f"{layer}.self_attn.q_norm.weight" in tensors:
            q = norm(q, f"{layer}.self_attn.q_norm.weight")
            k = norm(k, f"{layer}.self_attn.k_norm.weight")
        q, k = rope(q), rope(k)
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(n, heads * dim)
        x = x + linear(attended, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        h = gate / (1 + np.exp(-gate)) * linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(h, f"{layer}.mlp.down_proj")
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return norm(x, "model.norm.weight") @ get(f"{head}.weight").T


def greedy(config: Mapping, tensors: Tensors, prompt: list[int], max_tokens: int) -> list[int]:
    """The most likely continuation, one token at a time, everything computed anew for each."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(logits(config, tensors, ids)[-1].argmax()))
    return ids[len(prompt) :]
