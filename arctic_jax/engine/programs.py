"""The compiled step programs: one for each layout and bucket. Owned by the engine thread.

After `compile_all` nothing is compiled any more; `run` only looks programs up.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from arctic_jax.batch import Bucket, StepOutput, packed_size, unpack
from arctic_jax.engine import sampler
from arctic_jax.engine.program_store import ProgramStore
from arctic_jax.engine.sampler import SamplerState
from arctic_jax.kv_cache import KVCache, KVCacheSpec
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.shift_parallel import MeshLayout

logger = logging.getLogger(__name__)

Leaves = tuple[Array, ...]
_Key = tuple[MeshLayout, Bucket, int]
"""Layout, bucket, blocks of the cache."""


class ProgramCache:
    """`(layout, bucket)` to a compiled step; nothing else is ever a key.

    A step is `step(leaves, cache, state, output, packed) -> (cache, state, output)`, where all but
    the first and the last argument are donated. `output [max_rows, ...]` is a packed `StepOutput`:
    as an argument the one of the step before, whose tokens its successor takes before the host has
    seen them. `leaves` is the flat tuple of the model's parameters: rebuilding the module from it
    happens while the program is traced, not at each call.

    Nothing but `packed` lies at another address from step to step. On a GPU a program is a CUDA
    graph, and changed addresses cost as much of the host's time as all the rest of a launch.

    Args:
        model: the module, its parameters abstract.
        leaf_partitions: for each layout, where each leaf lies on the mesh.
        directory: where compiled programs are kept for the next start; `None` for nowhere.
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
        directory: Path | None = None,
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
        self._store = ProgramStore(
            directory,
            mesh.devices.flatten().tolist(),
            (type(model), model.config, model.implementation, dispatch.interpreter()),
            (leaf_partitions, self._leaf_shapes, mesh.shape, cache_spec),
            (max_blocks_per_seq, max_num_seqs, max_rows, max_logprobs),
        )
        self._set_row = self._set_row_program()
        self._copy = jax.jit(jnp.copy).lower(self._abstract_output()).compile()

    def compile(
        self,
        steps: Iterable[tuple[MeshLayout, Bucket]],
        num_blocks: int,
        on_compiled: Callable[[], None] = lambda: None,
    ) -> None:
        """Have a program for every step, from the store or compiled; and for no other.

        `num_blocks` is the same in every call: what an earlier one made is kept.

        Loading and XLA's work run on a few threads; tracing is serial.
        """
        steps = list(steps)
        found = {step: self._programs[step] for step in steps if step in self._programs}
        for _ in found:
            on_compiled()
        missing = [(*step, num_blocks) for step in steps if step not in found]
        start, tracing = time.perf_counter(), 0.0
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            jobs = {}
            for key, program in zip(missing, threads.map(self._load, missing), strict=True):
                if program is not None:
                    found[key[:2]] = program
                    on_compiled()
                else:
                    began = time.perf_counter()
                    lowered = self._lower(key)
                    tracing += time.perf_counter() - began
                    jobs[key[:2]] = threads.submit(self._compile, key, lowered)
                    jobs[key[:2]].add_done_callback(lambda _: on_compiled())
            found |= {step: job.result() for step, job in jobs.items()}
        if missing:
            seconds = time.perf_counter() - start
            message = "%d step programs from disk, %d compiled: %.1f s, %.1f of them tracing"
            logger.info(message, len(missing) - len(jobs), len(jobs), seconds, tracing)
        self._programs = found

    def workspace_bytes(self, layout: MeshLayout, bucket: Bucket, num_blocks: int) -> int:
        """Temporary memory of one device that the compiled step needs."""
        key = (layout, bucket, num_blocks)
        program = self._load(key) or self._compile(key, self._lower(key))
        analysis: Any = program.memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def run(
        self,
        layout: MeshLayout,
        bucket: Bucket,
        leaves: Leaves,
        cache: KVCache,
        state: SamplerState,
        output: Array,
        packed: np.ndarray,
    ) -> tuple[KVCache, SamplerState, Array]:
        """Start a step; what it returns are futures."""
        return self._programs[layout, bucket](leaves, cache, state, output, packed)

    def copy(self, output: Array) -> Array:
        """Copy a step's output for the host, since the next step writes over it."""
        return self._copy(output)

    def set_row(
        self, state: SamplerState, row: int, seen: np.ndarray, bias: np.ndarray
    ) -> SamplerState:
        """Replace one request's row of the sampler state, which is donated."""
        return self._set_row(state, np.int32(row), seen, bias)

    def _lower(self, key: _Key) -> jax.stages.Lowered:
        layout, bucket, _ = key
        partitions = self._leaf_partitions[layout]
        cache_partition = self._cache_spec.partition
        replicated = PartitionSpec()

        def step(
            leaves: Leaves, cache: KVCache, state: SamplerState, before: Array, packed: Array
        ) -> tuple[KVCache, SamplerState, Array]:
            model: LlamaForCausalLM = jax.tree.unflatten(self._treedef, leaves)
            batch = unpack(packed, bucket, self._max_blocks)
            known = batch.token_source < 0
            drawn = StepOutput.token_ids_of(before)[jnp.maximum(batch.token_source, 0)]
            token_ids = jnp.where(known, batch.token_ids, drawn)
            batch = dataclasses.replace(batch, token_ids=token_ids)
            logits, cache = model(batch, cache, layout)
            output, state = sampler.sample(
                logits, batch, state, self._max_logprobs, model.implementation
            )
            # An update in place of `before` makes XLA's CPU compiler crash on several devices.
            rows = jnp.pad(output.pack(), ((0, self._max_rows - bucket.num_rows), (0, 0)))
            return cache, state, rows

        sharded = jax.shard_map(
            step,
            mesh=self._mesh,
            in_specs=(partitions, cache_partition, replicated, replicated, replicated),
            out_specs=(cache_partition, replicated, replicated),
            check_vma=False,
        )
        # On GPUs a float32 product would otherwise be computed with 10 bits of mantissa.
        exact = "highest" if self._cache_spec.dtype == jnp.float32 else None
        with jax.default_matmul_precision(exact):
            return jax.jit(sharded, donate_argnums=(1, 2, 3)).lower(*self._arguments(key))

    def _compile(self, key: _Key, lowered: jax.stages.Lowered) -> Compiled:
        program = lowered.compile()
        self._store.save(key, program)
        return program

    def _load(self, key: _Key) -> Compiled | None:
        arguments = self._arguments(key)
        return self._store.load(key, arguments, arguments[1:-1])

    def _arguments(self, key: _Key) -> tuple[Any, ...]:
        """Return a step's abstract arguments; its results are like those that it donates."""
        layout, bucket, num_blocks = key
        partitions = self._leaf_partitions[layout]
        replicated = PartitionSpec()
        leaves = tuple(
            self._abstract(leaf_shape, dtype, partition)
            for (leaf_shape, dtype), partition in zip(self._leaf_shapes, partitions, strict=True)
        )
        shape = (num_blocks, *self._cache_shape)
        layer = self._abstract(shape, self._cache_spec.dtype, self._cache_spec.partition)
        layers = (layer,) * self._cache_spec.num_layers
        packed = self._abstract((packed_size(bucket, self._max_blocks),), jnp.int32, replicated)
        cache, state = KVCache(layers, layers), self._abstract_state()
        return leaves, cache, state, self._abstract_output(), packed

    @property
    def _cache_shape(self) -> tuple[int, int, int]:
        spec = self._cache_spec
        return (spec.num_kv_heads, spec.block_size, spec.head_dim)

    def _abstract(
        self, shape: tuple[int, ...], dtype: jnp.dtype, partition: PartitionSpec
    ) -> Any:  # a ShapeDtypeStruct that stands in for an Array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, partition))

    def _abstract_output(self) -> Any:
        shape = (self._max_rows, StepOutput.width(self._max_logprobs))
        return self._abstract(shape, jnp.dtype(jnp.int32), PartitionSpec())

    def _abstract_state(self) -> SamplerState:
        shape, replicated = self._state_shape, PartitionSpec()
        return SamplerState(
            seen=self._abstract(shape, jnp.dtype(jnp.int32), replicated),
            bias=self._abstract(shape, jnp.dtype(jnp.float32), replicated),
        )

    def _set_row_program(self) -> Compiled:
        replicated = PartitionSpec()
        vocab = self._state_shape[1:]
        arguments = (
            self._abstract_state(),
            self._abstract((), jnp.dtype(jnp.int32), replicated),
            self._abstract(vocab, jnp.dtype(jnp.int32), replicated),
            self._abstract(vocab, jnp.dtype(jnp.float32), replicated),
        )
        program = self._store.load("set_row", arguments, arguments[0])
        if program is None:
            program = jax.jit(sampler.set_row, donate_argnums=0).lower(*arguments).compile()
            self._store.save("set_row", program)
        return program
