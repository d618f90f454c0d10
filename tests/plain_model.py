"""A decoder without cache, batch or chunks, in float64 numpy: what the engine must agree with.

Written from the models' papers and configs, not from `models/`: it shares no line with them.
"""

from collections.abc import Mapping

import numpy as np

Tensors = Mapping[str, np.ndarray]


def logits(config: Mapping, tensors: Tensors, token_ids: list[int]) -> np.ndarray:
    """Logits `[tokens, vocab]` of a Llama-like model; `tensors` by their checkpoint names.

    With SwiftKV every layer runs on every token, under its rule for keys and values.
    """
    return forward(config, tensors, token_ids)[1]


def forward(
    config: Mapping, tensors: Tensors, token_ids: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What goes into the last layer `[tokens, hidden]`, and the logits."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    dim = config.get("head_dim") or config["hidden_size"] // heads
    eps = config["rms_norm_eps"]
    n = len(token_ids)
    positions = np.arange(n)
    frequencies = rope_frequencies(config, dim)
    lower = config.get("num_key_value_layers", config["num_hidden_layers"])
    group = config.get("key_value_group_size", 1)
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

    def feed_forward(x: np.ndarray, name: str) -> np.ndarray:
        gate = linear(x, f"{name}.gate_proj")
        return linear(
            gate / (1 + np.exp(-gate)) * linear(x, f"{name}.up_proj"), f"{name}.down_proj"
        )

    def mixture(x: np.ndarray, name: str) -> np.ndarray:
        """Each token by itself through its experts, one after the other."""
        scores = np.exp(linear(x, f"{name}.gate"))
        scores /= scores.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for token, score in enumerate(scores):
            best = np.argsort(-score, kind="stable")[: config["num_experts_per_tok"]]
            total = score[best].sum() if config["norm_topk_prob"] else 1
            for expert in best:
                weight = score[expert] / total
                out[token] += weight * feed_forward(x[token], f"{name}.experts.{expert}")
        return out

    x = middle = before_last = get("model.embed_tokens.weight")[token_ids]
    for i in range(config["num_hidden_layers"]):
        layer, before_last = f"model.layers.{i}", x
        h = source = norm(x, f"{layer}.input_layernorm.weight")
        owner, suffix = layer, ""
        if i == lower:
            middle = norm(x, "model.norm_swiftkv.weight")
        if i >= lower:
            owner, suffix = f"model.layers.{i - (i - lower) % group}", "_swiftkv"
            source = middle
        q = linear(h, f"{layer}.self_attn.q_proj{suffix}").reshape(n, heads, dim)
        k = linear(source, f"{owner}.self_attn.k_proj{suffix}").reshape(n, kv_heads, dim)
        v = linear(source, f"{owner}.self_attn.v_proj{suffix}").reshape(n, kv_heads, dim)
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
        if f"{layer}.mlp.gate.weight" in tensors:
            x = x + mixture(h, f"{layer}.mlp")
        else:
            x = x + feed_forward(h, f"{layer}.mlp")
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return before_last, norm(x, "model.norm.weight") @ get(f"{head}.weight").T


def rope_frequencies(config: Mapping, dim: int) -> np.ndarray:
    """Angles a position, `[dim/2]`; Llama 3.1 slows those that turn seldom within its old context.

    Between `low_freq_factor` and `high_freq_factor` turns the two are mixed.
    """
    frequencies = config.get("rope_theta", 10000.0) ** (-np.arange(0, dim, 2) / dim)
    scaling = config.get("rope_scaling")
    if scaling:
        assert scaling["rope_type"] == "llama3"
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    return frequencies


def greedy(config: Mapping, tensors: Tensors, prompt: list[int], max_tokens: int) -> list[int]:
    """The most likely continuation, one token at a time, everything computed anew for each."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(logits(config, tensors, ids)[-1].argmax()))
    return ids[len(prompt) :]
