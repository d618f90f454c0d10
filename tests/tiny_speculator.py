"""Tiny speculators in the forms that checkpoints have, and their arithmetic in plain numpy."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tiny_engine import CONFIG

GATES = ("forget", "input", "output", "cell")
LSTM: dict[str, Any] = {
    "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
    "base_model_archs": ["LlamaForCausalLM"],
    "input_hidden_dim": CONFIG["hidden_size"],
    "inner_dim": "24",
    "proj_dim": [24],
    "emb_dim": 24,
    "n_predict": 3,
    "vocab_size": CONFIG["vocab_size"],
    "tie_weights": True,
    "tie_lstm_embs": True,
    "scale_input": True,
    "method": "sum_lstm",
}
MLP: dict[str, Any] = {
    "architectures": ["ArcticMLPSpeculatorPreTrainedModel"],
    "base_model_archs": ["LlamaForCausalLM"],
    "model_type": "mlp_speculator",
    "emb_dim": CONFIG["hidden_size"],
    "inner_dim": 0,
    "n_predict": 3,
    "vocab_size": CONFIG["vocab_size"],
    "tie_weights": False,
    "scale_input": False,
}
SHARING = {"share_base_embedding": True, "share_base_head": True}
REDUCED = {"draft_vocab_size": 83}
CASES: dict[str, dict[str, Any]] = {
    "lstm": LSTM,
    "lstm_old_name": LSTM | {"architectures": ["MLPVariantSpeculatorPreTrainedModel"]},
    "lstm_untied": LSTM | {"tie_weights": False},
    "lstm_embedding_for_each_gate": LSTM | {"tie_lstm_embs": False, "scale_input": False},
    "lstm_sharing": LSTM | SHARING | {"tie_lstm_embs": False},
    "lstm_sharing_head": LSTM | {"share_base_head": True},
    "lstm_of_one_token": LSTM | {"n_predict": 1},
    "lstm_reduced": LSTM | REDUCED,
    "lstm_untied_reduced": LSTM | REDUCED | {"tie_weights": False},
    "mlp": MLP,
    "mlp_reduced": MLP | REDUCED,
    "mlp_tied": MLP | {"tie_weights": True, "inner_dim": 20, "scale_input": True},
    "mlp_tied_sharing": MLP | SHARING | {"tie_weights": True, "inner_dim": "20"},
    "mlp_of_ibm": MLP | {"architectures": ["MLPSpeculatorPreTrainedModel"], "n_predict": 4},
}


def is_lstm(config: dict[str, Any]) -> bool:
    return "method" in config


def sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Of the model's states, and of the speculator's."""
    hidden = config["input_hidden_dim"] if is_lstm(config) else config["emb_dim"]
    return hidden, int(config["inner_dim"]) or hidden


def make_speculator(config: dict[str, Any], seed: int = 3) -> dict[str, np.ndarray]:
    """Random tensors by their checkpoint names."""
    rng = np.random.default_rng(seed)
    hidden, inner = sizes(config)
    vocab, n = config["vocab_size"], config["n_predict"]
    heads = 1 if config["tie_weights"] else n
    kept = config.get("draft_vocab_size")
    shapes: dict[str, tuple[int, ...]] = {}
    norms = ["cell_ln", "state_ln"] if is_lstm(config) else ["ln"]
    gates = GATES if is_lstm(config) else ("",)
    tables = [f"{g}_emb" for g in GATES] if is_lstm(config) else ["emb"]
    if config.get("tie_lstm_embs"):
        tables = tables[:1]
    for i in range(heads):
        if config.get("share_base_embedding"):
            shapes[f"emb_proj.{i}.weight"] = (len(tables) * inner, hidden)
        else:
            shapes |= {f"{table}.{i}.weight": (vocab, inner) for table in tables}
        if config.get("share_base_head"):
            shapes[f"head_proj.{i}.weight"] = (hidden, inner)
        else:
            shapes[f"head.{i}.weight"] = (kept or vocab, inner)
        for norm in norms:
            shapes |= {f"{norm}.{i}.{kind}": (inner,) for kind in ("weight", "bias")}
    for i in range(min(n, 2) if config["tie_weights"] else n):
        for gate in gates:
            name = f"{gate}_proj" if gate else "proj"
            shapes[f"{name}.{i}.weight"] = (inner, inner if i else hidden)
    tensors = {
        name: rng.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    if kept:
        ids = np.sort(rng.choice(vocab, kept, replace=False)).astype(np.int32)
        tensors["draft_token_ids"] = ids
    return tensors


def write_speculator(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        make_speculator(config) if tensors is None else tensors, directory / "model.safetensors"
    )
    return directory


def plain_drafts(
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    base: tuple[np.ndarray, np.ndarray],
    hidden: np.ndarray,
    tokens: np.ndarray,
    following: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Drafts `[S, n]` and logits `[S, n, vocab]` in float64.

    `base` are the model's two matrices. With `following [S, n]` each head is told the tokens that
    really came before, instead of those that are drafted.
    """
    n, (_, inner) = config["n_predict"], sizes(config)
    state_weight = 0.5 ** (0.5 / n)
    alpha = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight
    tied = config["tie_weights"]
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    state = hidden.astype(np.float64)
    if config["scale_input"]:
        state = rms(state) / math.sqrt(2)
    cell = np.zeros((len(hidden), inner))
    drafts, all_logits = [], []
    for k in range(n):
        i, p = (0, min(k, 1)) if tied else (k, k)
        names = [f"{g}_emb" for g in GATES] if is_lstm(config) else ["emb"]
        if config.get("tie_lstm_embs"):
            names = names[:1]
        if config.get("share_base_embedding"):
            z = base[0][tokens].astype(np.float64) @ t[f"emb_proj.{i}.weight"].T
        else:
            z = np.concatenate([t[f"{name}.{i}.weight"][tokens] for name in names], axis=1)
        if is_lstm(config):
            z = np.tile(z, (1, 4)) if z.shape[1] == inner else z
            mixed = [
                state @ t[f"{g}_proj.{p}.weight"].T + alpha * z[:, j * inner : (j + 1) * inner]
                for j, g in enumerate(GATES)
            ]
            f, i_, o = (1 / (1 + np.exp(-x)) for x in mixed[:3])
            candidate = gelu(norm(t, f"cell_ln.{i}", mixed[3]))
            cell = f * cell + i_ * candidate
            state = o * gelu(norm(t, f"state_ln.{i}", cell))
        else:
            state = gelu(norm(t, f"ln.{i}", state @ t[f"proj.{p}.weight"].T + alpha * z))
        if config.get("share_base_head"):
            logits = state @ t[f"head_proj.{i}.weight"].T @ base[1].astype(np.float64).T
        else:
            logits = state @ t[f"head.{i}.weight"].T
        if config.get("draft_vocab_size"):
            known, logits = logits, np.full((len(logits), config["vocab_size"]), -np.inf)
            logits[:, tensors["draft_token_ids"]] = known
        tokens = logits.argmax(1)
        drafts.append(tokens)
        tokens = tokens if following is None else following[:, k]
        all_logits.append(logits)
    return np.stack(drafts, 1), np.stack(all_logits, 1)


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def norm(tensors: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return rms(x) * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
