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

from arctic_jax.batch import ForwardBatch, StepOutput, packed_size, resolve, unpack
from arctic_jax.config import ModelConfig
from arctic_jax.engine import rounds, sampler
from arctic_jax.engine.drafting import Drafting, Drawn
from arctic_jax.engine.sampler import SamplerState
from arctic_jax.kv_cache import KVCaches, KVCacheSpec
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.pallas_kernels.all_reduce.inboxes import addresses_shape
from arctic_jax.scheduled_batch import Bucket
from arctic_jax.shift_parallel import MeshLayout
from arctic_jax.weight_stacks import WeightStacks

Leaves = tuple[Array, ...]
REPLICATED = PartitionSpec()
DONATED = (2, 3, 4)
"""Which arguments of a step are donated: those that it returns."""
MOVES_A_CALL = 32
"""Tokens that a call of the program that moves them can move."""


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
class StepProgram:
    """What all step programs of an engine have in common.

    A step is `step(leaves, inboxes, caches, state, output, packed) -> (caches, state, output)`,
    which donates what it returns. `output [max_rows, ...]` is a packed
    `StepOutput`: as an argument the one of the step before, whose tokens its successor takes before
    the host has seen them. `leaves` are the arrays of the parameters, the model's and then the
    drafter's: rebuilding the modules from them happens while the program is traced, not at each
    call. `inboxes` are `Inboxes.addresses`, or `None`.

    Nothing but `packed` lies at another address from step to step. On a GPU a program is a CUDA
    graph, and changed addresses cost as much of the host's time as all the rest of a launch.

    Attributes:
        model_class, model_config, num_shards, implementation: what the module is made of.
        weights: how the parameters lie in `leaves`.
        cache: shapes of the caches; their type is that of the parameters.
        max_blocks_per_seq: columns of a block table.
        max_num_seqs: rows of the sampler's state.
        max_masks: rows of masked biases in it.
        max_rows: of `output`.
        max_logprobs: most likely tokens in it.
        max_draft_len: tokens of a draft; 0 for an engine that does not speculate.
        max_rounds: of a step.
        drafting: how the step drafts, if it does.
        has_inboxes: whether the devices can write to each other.
    """

    model_class: type[LlamaForCausalLM]
    model_config: ModelConfig
    num_shards: int
    implementation: str | None
    weights: WeightStacks
    cache: KVCacheSpec
    max_blocks_per_seq: int
    max_num_seqs: int
    max_masks: int
    max_rows: int
    max_logprobs: int
    max_draft_len: int = 0
    max_rounds: int = 1
    drafting: Drafting | None = None
    has_inboxes: bool = False

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
        results = results_of(arguments)
        tree = jax.tree.structure(results)
        function = jax.export.deserialize(bytearray(exported))
        return jax.jit(
            lambda *values: tree.unflatten(function.call(*jax.tree.leaves(values))),
            donate_argnums=DONATED,
            out_shardings=jax.tree.map(lambda value: value.sharding, results),
        ).lower(*arguments)

    def arguments(self, step: Step, mesh: Mesh) -> tuple[Any, ...]:
        """Return a step's abstract arguments; its results are like those that it donates."""
        leaves = self.weights.abstract(step.layout, mesh)
        shape = (packed_size(step.bucket, self.max_blocks_per_seq),)
        packed = _abstract(shape, jnp.int32, mesh)
        shapes = self.cache.shapes(step.num_blocks, mesh)
        inboxes = None
        if self.has_inboxes:
            shape = addresses_shape(mesh.size)
            inboxes = _abstract(shape, jnp.int32, mesh, PartitionSpec(mesh.axis_names))
        return leaves, inboxes, shapes, self.state(mesh), self.output(mesh), packed

    def state(self, mesh: Mesh) -> SamplerState:
        """Return the abstract state of the sampler."""
        vocab_size = self.model_config.vocab_size
        shapes = SamplerState.shapes(self.max_num_seqs, vocab_size, self.max_masks)
        return jax.tree.map(lambda array: _abstract(array.shape, array.dtype, mesh), shapes)

    def output(self, mesh: Mesh) -> Any:
        """Return the abstract output of a step."""
        shape = (self.max_rows, StepOutput.width(self.max_logprobs, self.num_drafted))
        return _abstract(shape, jnp.int32, mesh)

    def move(self, num_blocks: int, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
        """Return what moves tokens in the cache, which is donated, and its arguments."""
        slots = _abstract((2, MOVES_A_CALL), jnp.int32, mesh)
        lies = self.cache.partitions

        def moved(caches: KVCaches, slots: Array) -> KVCaches:
            return tuple(cache.moved(slots) for cache in caches)

        function = jax.shard_map(moved, mesh=mesh, in_specs=(lies, REPLICATED), out_specs=lies)
        return jax.jit(function, donate_argnums=0), (self.cache.shapes(num_blocks, mesh), slots)

    @property
    def num_drafted(self) -> int:
        """Tokens of each draft in a step's output."""
        return self.drafting.num_tokens if self.drafting else 0

    def _modules(self) -> tuple[LlamaForCausalLM, Any]:
        """Return the modules without their parameters."""
        return _abstract_modules(
            self.model_class, self.model_config, self.num_shards, self.implementation, self.drafting
        )

    def _jitted(self, step: Step, mesh: Mesh) -> Any:
        return jax.jit(self._function(step, mesh), donate_argnums=DONATED)

    def _function(self, step: Step, mesh: Mesh) -> Any:
        plan, bucket, _ = step
        max_draft_len = self.max_draft_len if bucket.num_rows > bucket.num_seqs else 0
        num_drafted = self.num_drafted
        tree = jax.tree.structure(self._modules())

        def modules(leaves: Leaves) -> tuple[LlamaForCausalLM, Any]:
            return jax.tree.unflatten(tree, self.weights.parameters(leaves, plan))

        def run(
            leaves: Leaves,
            inboxes: Array | None,
            caches: KVCaches,
            state: SamplerState,
            before: Array,
            packed: Array,
        ) -> tuple[KVCaches, SamplerState, Array]:
            layout = dataclasses.replace(plan, inboxes=inboxes)
            batch = resolve(
                unpack(packed, bucket, self.max_blocks_per_seq),
                before,
                num_drafted,
                self.max_draft_len,
                self.max_rounds,
                self.cache.block_size,
            )

            def go(
                batch: ForwardBatch, caches: KVCaches, state: SamplerState
            ) -> tuple[StepOutput, KVCaches, SamplerState]:
                # The modules are made here, not before a loop of rounds: it would be given copies
                # of the parts of the stacks in which the weights lie.
                model, drafter = modules(leaves)
                cache, *drafter_caches = caches
                hidden, cache = model.hidden_states(batch, cache, layout)
                logits = model.logits(hidden, layout)
                output, state = sampler.sample(
                    logits, batch, state, self.max_logprobs, max_draft_len, model.implementation
                )
                if self.drafting is not None:
                    drawn = Drawn(model, batch, hidden, output, layout)
                    drafter_caches = self.drafting.follow(drafter, drawn, tuple(drafter_caches))
                    drafts = jnp.full((1, num_drafted), -1)
                    if bucket.drafts:
                        drafts, drafter_caches = self.drafting.draft(
                            lambda: modules(leaves)[1], drawn, drafter_caches
                        )
                    drafts = jnp.pad(drafts, ((0, len(hidden) - len(drafts)), (0, 0)))
                    output = dataclasses.replace(output, drafts=drafts)
                return output, (cache, *drafter_caches), state

            def round_(carry: Any, index: Array) -> tuple[Any, Array]:
                progress, caches, state = carry
                current = rounds.batch_of(batch, progress, index, self.cache.block_size)
                output, caches, state = go(current, caches, state)
                progress, output = rounds.advance(current, progress, output, index)
                return (progress, caches, state), output.pack()

            if bucket.num_rounds > 1:
                first = rounds.begin(batch), caches, state
                (_, caches, state), rows = jax.lax.scan(
                    round_, first, jnp.arange(bucket.num_rounds)
                )
                rows = rows.reshape(bucket.num_output_rows, -1)
            else:
                output, caches, state = go(batch, caches, state)
                rows = output.pack()
            # Padded, as updates in place of a step's output make XLA's CPU compiler crash on
            # several devices.
            rows = jnp.pad(rows, ((0, self.max_rows - bucket.num_output_rows), (0, 0)))
            return caches, state, rows

        donated = (self.cache.partitions, REPLICATED, REPLICATED)
        everywhere = PartitionSpec(mesh.axis_names)
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(self.weights.partitions(plan), everywhere, *donated, REPLICATED),
            out_specs=donated,
            check_vma=False,
        )

    def _precision(self) -> Any:
        """On GPUs a float32 product would otherwise be computed with 10 bits of mantissa."""
        exact = "highest" if self.cache.dtype == jnp.float32 else None
        return jax.default_matmul_precision(exact)


def results_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return of a step's abstract arguments those that its results are like."""
    return tuple(arguments[i] for i in DONATED)


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
) -> tuple[LlamaForCausalLM, Any]:
    model = nnx.eval_shape(lambda: model_class(config, num_shards, implementation))
    return model, drafting.module(num_shards, implementation) if drafting else None
