"""A tiny random model in memory, and engines of it in any shape."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from arctic_jax.config import EngineConfig
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.replicas import Engine
from arctic_jax.loading.model_files import ModelFiles
from arctic_jax.loading.tokenizer import numbered_tokenizer
from arctic_jax.request import RequestOutput, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def make_tensors(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by their checkpoint names; large enough for clear preferences."""
    rng = np.random.default_rng(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    norms = ["model.norm"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        shapes[f"{layer}.self_attn.q_proj"] = (q, hidden)
        shapes[f"{layer}.self_attn.k_proj"] = (kv, hidden)
        shapes[f"{layer}.self_attn.v_proj"] = (kv, hidden)
        shapes[f"{layer}.self_attn.o_proj"] = (hidden, q)
        shapes[f"{layer}.mlp.gate_proj"] = (ffn, hidden)
        shapes[f"{layer}.mlp.up_proj"] = (ffn, hidden)
        shapes[f"{layer}.mlp.down_proj"] = (hidden, ffn)
    tensors = {
        f"{name}.weight": (rng.normal(size=shape) * 1.5 / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    tensors |= {
        f"{name}.weight": (1 + 0.1 * rng.normal(size=hidden)).astype(np.float32) for name in norms
    }
    return tensors


class TensorsInMemory:
    """A `Checkpoint` of arrays."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        tensor = self.tensors[name][rows]
        return tensor if tensor.ndim == 1 else tensor[:, columns]


def make_files(
    config: dict[str, Any] = CONFIG, tensors: dict[str, np.ndarray] | None = None
) -> ModelFiles:
    """The tiny model as if it had been opened."""
    return ModelFiles(
        config,
        TensorsInMemory(make_tensors(config) if tensors is None else tensors),
        numbered_tokenizer(config["vocab_size"]),
        {},
    )


def write_files(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Write such a model."""
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    numbered_tokenizer(config["vocab_size"]).backend.save(str(directory / "tokenizer.json"))
    return directory


def options_of(**options: Any) -> dict[str, Any]:
    """Options as for `LLM`, with small defaults."""
    defaults: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "block_size": 4,
        "num_blocks": 64,
        "dtype": "float32",
    }
    return defaults | options


def make_engine(
    config: dict[str, Any] = CONFIG, tensors: dict[str, np.ndarray] | None = None, **options: Any
) -> EngineCore:
    """An engine of the tiny model; `options` as for `LLM`."""
    files = make_files(config, tensors)
    return EngineCore(EngineConfig.from_keywords(**options_of(**options)), files=files)


def run(engine: Engine, max_steps: int = 10_000) -> dict[str, RequestOutput]:
    """Step until everything is done; the last output of each request."""
    done = {}
    for _ in range(max_steps):
        if not engine.has_requests:
            return done
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
    raise AssertionError(f"still running after {max_steps} steps")


def check_caches_are_updated_in_place(engine: EngineCore) -> None:
    """No program copies a cache: that would cost more than the step."""
    arrays = jax.tree.leaves(engine.runner.caches)
    shapes = {",".join(map(str, a.addressable_shards[0].data.shape)) for a in arrays}
    for layout, bucket in engine.runner.picker.steps:
        text = engine.runner.programs.hlo(layout, bucket)
        assert shapes <= set(re.findall(r"\[([\d,]+)\]", text))
        assert shapes.isdisjoint(re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)), bucket
