"""Tiny SwiftKV models by their numbers, and the model alone, step by step: no engine."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from tiny_engine import CONFIG, TensorsInMemory

from arctic_jax import testing, weights
from arctic_jax.batch import host_views, packed_size, unpack
from arctic_jax.kv_cache import KVCache
from arctic_jax.models.layers import named_parameters
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.models.registry import model_class
from arctic_jax.scheduled_batch import Bucket
from arctic_jax.shift_parallel import make_mesh, shift

SEED = 11
UNWRITTEN = 77.0


def swiftkv_config(lower: int, group: int = 1, layers: int = 4, **changes: Any) -> dict[str, Any]:
    """The tiny Llama with `layers - lower` upper layers that share keys and values by `group`."""
    return (
        CONFIG
        | {
            "architectures": ["LlamaSwiftKVForCausalLM"],
            "model_type": "llama_swiftkv",
            "num_hidden_layers": layers,
            "num_key_value_layers": lower,
            "key_value_group_size": group,
        }
        | changes
    )


def swiftkv_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    return testing.make_tensors(config, SEED)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], length)]


def load_model(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """The model with its weights, on one device."""
    cls = model_class(config)
    model_config = cls.config_from_hf(config)
    model = nnx.eval_shape(lambda: cls(model_config, 1))
    parameters = {
        path: weights.ParameterSpec(variable.shape, np.dtype(np.float32), PartitionSpec())
        for path, variable in named_parameters(model).items()
    }
    placed = weights.load(
        parameters, model.weight_sources(), TensorsInMemory(tensors), make_mesh(1, 1)
    )
    return jax.tree.unflatten(jax.tree.structure(model), [array for _, array in placed])


@dataclass
class Chunk:
    """Tokens `start..` of a sequence; the last `rows` of them have a row of logits."""

    token_ids: list[int]
    start: int
    rows: int
    blocks: list[int]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _step(
    model: LlamaForCausalLM, packed: jax.Array, cache: KVCache, bucket: Bucket, width: int
) -> tuple[jax.Array, KVCache]:
    return model(unpack(packed, bucket, width), cache, shift(1, 1))


class Steps:
    """Runs steps of a model over one cache, which is `UNWRITTEN` at first: no zeros, that hide."""

    def __init__(self, model: LlamaForCausalLM, num_blocks: int, block_size: int) -> None:
        self.model, self.block_size = model, block_size
        self.clear(num_blocks)

    def clear(self, num_blocks: int) -> None:
        """Begin again, with so many blocks."""
        config, groups = self.model.config, self.model.num_kv_groups
        shape = (config.num_cache_layers, num_blocks, groups, self.block_size, config.head_dim)
        self.cache = KVCache(*(jnp.full(shape, UNWRITTEN) for _ in "kv"))

    def run(self, chunks: list[Chunk], padding: int = 0) -> list[np.ndarray]:
        """Logits of each chunk's rows; `padding` more tokens, rows and sequences are not real."""
        T = sum(len(c.token_ids) for c in chunks)
        R = sum(c.rows for c in chunks)
        S, width = len(chunks), max(len(c.blocks) for c in chunks)
        bucket = Bucket(T + padding, max(R + padding, 1), S + padding, T + padding)
        packed = np.zeros(packed_size(bucket, width), np.int32)
        views = host_views(packed, bucket, width)
        views["slot_mapping"][:] = views["logit_rows"][:] = -1
        views["query_start_loc"][:] = T
        token = row = 0
        for s, c in enumerate(chunks):
            n = len(c.token_ids)
            positions = np.arange(c.start, c.start + n)
            blocks = np.array(c.blocks)[positions // self.block_size]
            here = slice(token, token + n)
            views["token_ids"][here] = c.token_ids
            views["positions"][here] = positions
            views["slot_mapping"][here] = blocks * self.block_size + positions % self.block_size
            views["query_start_loc"][s] = token
            views["seq_lens"][s] = c.start + n
            views["block_tables"][s, : len(c.blocks)] = c.blocks
            views["logit_rows"][row : row + c.rows] = np.arange(token + n - c.rows, token + n)
            views["row_seq"][row : row + c.rows] = s
            token, row = token + n, row + c.rows
        logits, self.cache = _step(self.model, packed, self.cache, bucket, width)
        ends = np.cumsum([c.rows for c in chunks])
        return np.split(np.asarray(logits)[:R], ends[:-1])
