"""What one step of an engine computes, as a function that is lowered for a layout and a bucket.

Pure, and independent of devices that exist: the programs are lowered in this process
(`programs.py`) or in others (`lowering.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax.batch import Bucket, ForwardBatch, StepOutput, packed_size, unpack
from arctic_jax.config import ModelConfig
from arctic_jax.engine import sampler
from arctic_jax.engine.sampler import SamplerState
from arctic_jax.kv_cache import KVCache, KVCacheSpec
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.models.speculator import Speculator, SpeculatorConfig, Vocabulary
from arctic_jax.shift_parallel import MeshLayout

Leaves = tuple[Array, ...]
REPLICATED = PartitionSpec()


class Step(NamedTuple):
    """Which program: nothing else is ever a key.

    Attributes:
        layout: how the step is spread over the devices.
        bucket: its shape.
        num_blocks: of the cache.
    """

    layout: MeshLayout
    bucket: Bucket
    num_blocks: int


@dataclass(frozen=True)
class Drafting:
    """How a step drafts for the next one, with a speculator beside the model.

    Attributes:
        speculator_class, config: what the speculator is made of.
        num_tokens: K, of a draft.
        max_num_seqs: only the first so many sequences of a step get one.
    """

    speculator_class: type[Speculator]
    config: SpeculatorConfig
    num_tokens: int
    max_num_seqs: int

    def module(self, num_shards: int) -> Speculator:
        """Return the speculator without its parameters."""
        return nnx.eval_shape(lambda: self.speculator_class(self.config, num_shards))


@dataclass(frozen=True)
class StepProgram:
    """What all step programs of an engine have in common.

    A step is `step(leaves, cache, state, output, packed) -> (cache, state, output)`, where all but
    the first and the last argument are donated. `output [max_rows, ...]` is a packed `StepOutput`:
    as an argument the one of the step before, whose tokens its successor takes before the host has
    seen them. `leaves` is the flat tuple of the parameters, the model's and then the speculator's:
    rebuilding the modules from it happens while the program is traced, not at each call.

    Nothing but `packed` lies at another address from step to step. On a GPU a program is a CUDA
    graph, and changed addresses cost as much of the host's time as all the rest of a launch.

    Attributes:
        model_class, model_config, num_shards, implementation: what the module is made of.
        partitions: for each layout, where each leaf lies on the mesh.
        cache: shapes of the cache; its type is that of the parameters.
        max_blocks_per_seq: columns of a block table.
        max_num_seqs: rows of the sampler's state.
        max_masks: rows of masked biases in it.
        max_rows: of `output`.
        max_logprobs: most likely tokens in it.
        max_draft_len: tokens of a draft; 0 for an engine that does not speculate.
        drafting: `None` without a speculator.
    """

    model_class: type[LlamaForCausalLM]
    model_config: ModelConfig
    num_shards: int
    implementation: str | None
    partitions: dict[MeshLayout, tuple[PartitionSpec, ...]]
    cache: KVCacheSpec
    max_blocks_per_seq: int
    max_num_seqs: int
    max_masks: int
    max_rows: int
    max_logprobs: int
    max_draft_len: int = 0
    drafting: Drafting | None = None

    def lower(self, step: Step, mesh: Mesh) -> jax.stages.Lowered:
        """Trace and lower a step for the devices of `mesh`."""
        with self._precision():
            return self._jitted(step, mesh).lower(*self.arguments(step, mesh))

    def export(self, step: Step, mesh: Mesh, platform: str) -> bytes:
        """Trace and lower a step for `platform`, with the devices of `mesh` as stand-ins."""
        arguments = self.arguments(step, mesh)
        tree = jax.tree.structure(arguments)

        def flat(*leaves: Array) -> tuple[Array, ...]:
            return tuple(jax.tree.leaves(self._function(step, mesh)(*tree.unflatten(leaves))))

        kernels = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
        exported = jax.export.export(jax.jit(flat), platforms=[platform], disabled_checks=[kernels])
        with self._precision():
            return bytes(exported(*jax.tree.leaves(arguments)).serialize())

    def lower_exported(self, exported: bytes, step: Step, mesh: Mesh) -> jax.stages.Lowered:
        """Make of what `export` returned in another process what `lower` returns in this one."""
        arguments = self.arguments(step, mesh)
        donated = arguments[1:-1]
        tree = jax.tree.structure(donated)
        function = jax.export.deserialize(bytearray(exported))
        return jax.jit(
            lambda *values: tree.unflatten(function.call(*jax.tree.leaves(values))),
            donate_argnums=(1, 2, 3),
            out_shardings=jax.tree.map(lambda value: value.sharding, donated),
        ).lower(*arguments)

    def arguments(self, step: Step, mesh: Mesh) -> tuple[Any, ...]:
        """Return a step's abstract arguments; its results are like those that it donates."""
        cache, dtype = self.cache, self.cache.dtype
        leaves = tuple(
            _abstract(leaf.shape, dtype, mesh, partition)
            for leaf, partition in zip(
                jax.tree.leaves(self._modules()), self.partitions[step.layout], strict=True
            )
        )
        shape = (step.num_blocks, cache.num_kv_heads, cache.block_size, cache.head_dim)
        layers = (_abstract(shape, dtype, mesh, cache.partition),) * cache.num_layers
        shape = (packed_size(step.bucket, self.max_blocks_per_seq),)
        packed = _abstract(shape, jnp.int32, mesh)
        return leaves, KVCache(layers, layers), self.state(mesh), self.output(mesh), packed

    def state(self, mesh: Mesh) -> SamplerState:
        """Return the abstract state of the sampler."""
        vocab_size = self.model_config.vocab_size
        shapes = SamplerState.shapes(self.max_num_seqs, vocab_size, self.max_masks)
        return jax.tree.map(lambda array: _abstract(array.shape, array.dtype, mesh), shapes)

    def output(self, mesh: Mesh) -> Any:
        """Return the abstract output of a step."""
        drafted = self.drafting.num_tokens if self.drafting else 0
        shape = (self.max_rows, StepOutput.width(self.max_logprobs, drafted))
        return _abstract(shape, jnp.int32, mesh)

    def _modules(self) -> tuple[LlamaForCausalLM, Speculator | None]:
        """Return the modules without their parameters."""
        return _abstract_modules(
            self.model_class, self.model_config, self.num_shards, self.implementation, self.drafting
        )

    def _jitted(self, step: Step, mesh: Mesh) -> Any:
        return jax.jit(self._function(step, mesh), donate_argnums=(1, 2, 3))

    def _function(self, step: Step, mesh: Mesh) -> Any:
        layout, bucket, _ = step
        max_draft_len = self.max_draft_len if bucket.num_rows > bucket.num_seqs else 0
        tree = jax.tree.structure(self._modules())

        def run(
            leaves: Leaves, cache: KVCache, state: SamplerState, before: Array, packed: Array
        ) -> tuple[KVCache, SamplerState, Array]:
            model: LlamaForCausalLM
            speculator: Speculator | None
            model, speculator = jax.tree.unflatten(tree, leaves)
            batch = unpack(packed, bucket, self.max_blocks_per_seq)
            known = batch.token_source < 0
            drawn = StepOutput.token_ids_of(before)[jnp.maximum(batch.token_source, 0)]
            token_ids = jnp.where(known, batch.token_ids, drawn)
            batch = dataclasses.replace(batch, token_ids=token_ids)
            hidden, cache = model.hidden_states(batch, cache, layout)
            logits = model.logits(hidden, layout)
            output, state = sampler.sample(
                logits, batch, state, self.max_logprobs, max_draft_len, model.implementation
            )
            if self.drafting is not None and speculator is not None:
                drafts = _draft(self.drafting, speculator, model, hidden, output, batch, layout)
                output = dataclasses.replace(output, drafts=drafts)
            # An update in place of `before` makes XLA's CPU compiler crash on several devices.
            rows = jnp.pad(output.pack(), ((0, self.max_rows - bucket.num_rows), (0, 0)))
            return cache, state, rows

        donated = (self.cache.partition, REPLICATED, REPLICATED)
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(self.partitions[layout], *donated, REPLICATED),
            out_specs=donated,
            check_vma=False,
        )

    def _precision(self) -> Any:
        """On GPUs a float32 product would otherwise be computed with 10 bits of mantissa."""
        exact = "highest" if self.cache.dtype == jnp.float32 else None
        return jax.default_matmul_precision(exact)


def _draft(
    drafting: Drafting,
    speculator: Speculator,
    model: LlamaForCausalLM,
    hidden: Array,
    output: StepOutput,
    batch: ForwardBatch,
    layout: MeshLayout,
) -> Array:
    """Draft after the last token that was drawn for each of the first sequences.

    Args:
        drafting: how much.
        speculator: who drafts.
        model: whose matrices it may use.
        hidden: `[R, hidden]`; of each sequence the row that drew that token counts.
        output: what was drawn.
        batch: of the step.
        layout: of the step.

    Returns:
        `[R, K]`, a row each sequence; of one that drew nothing, and in rows left over, anything.
    """
    num_rows, num_seqs = len(hidden), batch.seq_lens.shape[0]
    rows = jnp.arange(num_rows)
    draws = (batch.row_target < 0) & (output.token_ids >= 0)
    last = jnp.zeros(num_seqs, jnp.int32).at[batch.row_seq].max(jnp.where(draws, rows, 0))
    last = last[: drafting.max_num_seqs]
    vocabulary = Vocabulary(model.embed, model.head)
    drafts = speculator(
        hidden[last], output.token_ids[last], vocabulary, layout, drafting.num_tokens
    )
    return jnp.pad(drafts, ((0, num_rows - len(last)), (0, 0)))


def _abstract(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh, partition: PartitionSpec = REPLICATED
) -> Any:  # a ShapeDtypeStruct that stands in for an Array
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition))


@functools.lru_cache(maxsize=1)  # it takes 50 ms, and every program asks for it several times
def _abstract_modules(
    model_class: type[LlamaForCausalLM],
    config: ModelConfig,
    num_shards: int,
    implementation: str | None,
    drafting: Drafting | None,
) -> tuple[LlamaForCausalLM, Speculator | None]:
    model = nnx.eval_shape(lambda: model_class(config, num_shards, implementation))
    return model, drafting.module(num_shards) if drafting else None
