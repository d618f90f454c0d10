"""The compiled step programs: one for each layout and bucket. Owned by the engine thread.

After `compile_all` nothing is compiled any more; `run` only looks programs up.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from arctic_jax.batch import Bucket, packed_size, unpack
from arctic_jax.engine import sampler
from arctic_jax.engine.sampler import SamplerState
from arctic_jax.kv_cache import KVCache, KVCacheSpec
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.shift_parallel import MeshLayout

logger = logging.getLogger(__name__)

Leaves = tuple[Array, ...]


class ProgramCache:
    """`(layout, bucket)` to a compiled step; nothing else is ever a key.

    A step is `step(leaves, cache, state, drawn, packed) -> (cache, state, drawn, output)`, with
    cache and state donated. `drawn [max_rows]` are the tokens of the step before, which its
    successor takes before the host has seen them; `output` is a packed `StepOutput`. `leaves` is
    the flat tuple of the model's parameters: rebuilding the module from it happens while the
    program is traced, not at each call.

    Args:
        model: the module, its parameters abstract.
        leaf_partitions: for each layout, where each leaf lies on the mesh.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        leaf_partitions: dict[MeshLayout, tuple[PartitionSpec, ...]],
        mesh: Mesh,
        cache_spec: KVCacheSpec,
        max_blocks_per_seq: int,
        max_num_seqs: int,
        max_rows: int,
        max_logprobs: int,
    ) -> None:
        leaves, self._treedef = jax.tree.flatten(model)
        self._leaf_shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
        self._leaf_partitions = leaf_partitions
        self._mesh = mesh
        self._cache_spec = cache_spec
        self._max_blocks = max_blocks_per_seq
        self._state_shape = (max_num_seqs, model.config.vocab_size)
        self._max_rows = max_rows
        self._max_logprobs = max_logprobs
        self._programs: dict[tuple[MeshLayout, Bucket], Compiled] = {}
        self._set_row = self._compile_set_row()
        self.num_compiled = 1

    def compile_all(
        self,
        layouts: Sequence[MeshLayout],
        buckets: Sequence[Bucket],
        num_blocks: int,
        on_compiled: Callable[[], None] = lambda: None,
    ) -> None:
        """Compile every pair; tracing is serial, XLA's work runs on a few threads."""
        keys = [(layout, bucket) for layout in layouts for bucket in buckets]

        def compile_one(key: tuple[MeshLayout, Bucket], lowered: jax.stages.Lowered) -> None:
            self._programs[key] = lowered.compile()
            on_compiled()

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            jobs = [threads.submit(compile_one, key, self._lower(*key, num_blocks)) for key in keys]
            for job in jobs:
                job.result()
        self.num_compiled += len(keys)

    def workspace_bytes(self, layout: MeshLayout, bucket: Bucket, num_blocks: int) -> int:
        """Temporary memory of one device that the compiled step needs."""
        analysis: Any = self._lower(layout, bucket, num_blocks).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def run(
        self,
        layout: MeshLayout,
        bucket: Bucket,
        leaves: Leaves,
        cache: KVCache,
        state: SamplerState,
        drawn: Array,
        packed: np.ndarray,
    ) -> tuple[KVCache, SamplerState, Array, Array]:
        """Start a step; what it returns are futures, the last one a packed `StepOutput`."""
        return self._programs[layout, bucket](leaves, cache, state, drawn, packed)

    def set_row(
        self, state: SamplerState, row: int, seen: np.ndarray, bias: np.ndarray
    ) -> SamplerState:
        """Replace one request's row of the sampler state, which is donated."""
        return self._set_row(state, np.int32(row), seen, bias)

    def _lower(self, layout: MeshLayout, bucket: Bucket, num_blocks: int) -> jax.stages.Lowered:
        partitions = self._leaf_partitions[layout]
        cache_partition = self._cache_spec.partition
        replicated = PartitionSpec()

        def step(
            leaves: Leaves, cache: KVCache, state: SamplerState, drawn: Array, packed: Array
        ) -> tuple[KVCache, SamplerState, Array, Array]:
            model: LlamaForCausalLM = jax.tree.unflatten(self._treedef, leaves)
            batch = unpack(packed, bucket, self._max_blocks)
            known = batch.token_source < 0
            token_ids = jnp.where(known, batch.token_ids, drawn[jnp.maximum(batch.token_source, 0)])
            batch = dataclasses.replace(batch, token_ids=token_ids)
            logits, cache = model(batch, cache, layout)
            output, state = sampler.sample(logits, batch, state, self._max_logprobs)
            # An update in place of `drawn` makes XLA's CPU compiler crash on several devices.
            drawn = jnp.pad(output.token_ids, (0, self._max_rows - bucket.num_rows))
            return cache, state, drawn, output.pack()

        sharded = jax.shard_map(
            step,
            mesh=self._mesh,
            in_specs=(partitions, cache_partition, replicated, replicated, replicated),
            out_specs=(cache_partition, replicated, replicated, replicated),
            check_vma=False,
        )
        shape = (num_blocks, *self._cache_shape)
        leaves = tuple(
            self._abstract(leaf_shape, dtype, partition)
            for (leaf_shape, dtype), partition in zip(self._leaf_shapes, partitions, strict=True)
        )
        layer = self._abstract(shape, self._cache_spec.dtype, cache_partition)
        layers = (layer,) * self._cache_spec.num_layers
        drawn = self._abstract((self._max_rows,), jnp.dtype(jnp.int32), replicated)
        packed = self._abstract((packed_size(bucket, self._max_blocks),), jnp.int32, replicated)
        # On GPUs a float32 product would otherwise be computed with 10 bits of mantissa.
        exact = "highest" if self._cache_spec.dtype == jnp.float32 else None
        with jax.default_matmul_precision(exact):
            return jax.jit(sharded, donate_argnums=(1, 2)).lower(
                leaves, KVCache(layers, layers), self._abstract_state(), drawn, packed
            )

    @property
    def _cache_shape(self) -> tuple[int, int, int]:
        spec = self._cache_spec
        return (spec.num_kv_heads, spec.block_size, spec.head_dim)

    def _abstract(
        self, shape: tuple[int, ...], dtype: jnp.dtype, partition: PartitionSpec
    ) -> Any:  # a ShapeDtypeStruct that stands in for an Array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, partition))

    def _abstract_state(self) -> SamplerState:
        shape, replicated = self._state_shape, PartitionSpec()
        return SamplerState(
            seen=self._abstract(shape, jnp.dtype(jnp.int32), replicated),
            bias=self._abstract(shape, jnp.dtype(jnp.float32), replicated),
        )

    def _compile_set_row(self) -> Compiled:
        replicated = PartitionSpec()
        vocab = self._state_shape[1:]
        return (
            jax.jit(sampler.set_row, donate_argnums=0)
            .lower(
                self._abstract_state(),
                self._abstract((), jnp.dtype(jnp.int32), replicated),
                self._abstract(vocab, jnp.dtype(jnp.int32), replicated),
                self._abstract(vocab, jnp.dtype(jnp.float32), replicated),
            )
            .compile()
        )
