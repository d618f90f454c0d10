"""The model on its devices: weights, cache, programs, and one step at a time.

Owned by the engine thread. `ModelRunner.launch` packs a `ScheduledBatch` into the layout and bucket
picked for it, starts the program and lets the results come to the host.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import statistics
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax import host_copies
from arctic_jax.batch import HostOutput, StepOutput, packed_size
from arctic_jax.config import CacheConfig, EngineConfig, ModelConfig, StepLimits
from arctic_jax.engine import program_store, rounds
from arctic_jax.engine.crossover import Crossover, CrossoverStore, probe, tokens_to_measure
from arctic_jax.engine.drafter_files import DrafterFiles
from arctic_jax.engine.grammar_masks import GrammarMasks
from arctic_jax.engine.layout_picker import LayoutPicker
from arctic_jax.engine.multihost import Followers, Launch, Leader, Nodes
from arctic_jax.engine.packer import StepPacker
from arctic_jax.engine.programs import ProgramCache
from arctic_jax.engine.sampler import SamplerState
from arctic_jax.engine.sampler_rows import SamplerRows
from arctic_jax.engine.step_program import StepProgram
from arctic_jax.engine.weight_loading import Placed, WeightLoader
from arctic_jax.kv_cache import KVCaches, KVCacheSpec, ModelCacheSpec, TokenCacheSpec
from arctic_jax.loading.orbax_checkpoint import OrbaxCheckpoint
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.pallas_kernels.all_reduce import Inboxes
from arctic_jax.progress import Report, counted, silent
from arctic_jax.request import Request
from arctic_jax.scheduled_batch import Bucket, ScheduledBatch, ScheduledRequest, bucket_ladder
from arctic_jax.shift_parallel import MeshLayout, make_mesh, shift, ulysses
from arctic_jax.weights import Checkpoint

logger = logging.getLogger(__name__)

MAX_EXTRA_ROWS = 256  # of a step, for prompt log-probabilities or drafts
MAX_PROCESSES = 8  # that lower programs

_cpu_collectives = threading.Lock()


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device computes.

    Attributes:
        scheduled: what it computes.
        layout: how.
        num_padded_tokens: tokens that it computes, in all its rounds.
        launched: when, a `time.perf_counter()`.
        output: a packed `StepOutput`, a round after the other.
        stride: rows of it for each round.
        num_drafted: its K.
    """

    scheduled: ScheduledBatch
    layout: MeshLayout
    num_padded_tokens: int
    launched: float
    output: jax.Array
    stride: int
    num_drafted: int

    def wait(self) -> HostOutput:
        """Wait for its results."""
        rows = (self.scheduled.num_rounds - 1) * self.stride + self.scheduled.num_rows
        packed = host_copies.finish(self.output)
        return HostOutput.unpack(packed, rows, self.num_drafted, self.stride)


class ModelRunner:
    """Loads a model and runs its steps.

    Args:
        config: what the user set.
        limits: of a step.
        model_class: from the registry.
        model_config: the model's numbers.
        checkpoint: where weights come from; `None` for random ones.
        report: told how far loading and compiling are.
        devices: those to use; `None` for the first ones.
        drafter: drafts within the steps, if there is one.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: StepLimits,
        model_class: type[LlamaForCausalLM],
        model_config: ModelConfig,
        checkpoint: Checkpoint | OrbaxCheckpoint | None,
        report: Report,
        devices: Sequence[Any] | None = None,
        drafter: DrafterFiles | None = None,
    ) -> None:
        parallel = config.parallel
        self.nodes = Nodes(parallel)
        self.nodes.check(config, model_config, limits)
        tp, sp = parallel.tensor_parallel_size, parallel.ulysses_sequence_parallel_size
        self.model_config = model_config
        self.mesh = make_mesh(tp, sp, devices)
        # The weights are placed for the last one, the coarser; see `LayoutPicker`.
        self.layouts = [shift(tp, sp)] if sp == 1 or parallel.enable_shift_parallel else []
        self.layouts += [ulysses(tp, sp)] if sp > 1 else []
        self.limits = limits
        self.max_num_seqs = limits.max_num_seqs
        # Where only the rows that need logits reach the upper layers, a prompt's rows stay few.
        has_all_rows = model_config.num_lower_layers == model_config.num_hidden_layers
        most_rows = min(MAX_EXTRA_ROWS, limits.max_num_batched_tokens)
        self.max_prompt_rows = most_rows if has_all_rows else 0
        drafts = config.speculative.max_draft_len > 0
        self.max_extra_rows = most_rows if drafts else self.max_prompt_rows
        self.dtype = _compute_dtype(config.load.dtype, model_config)
        self.num_rounds = self._rounds(config, model_class)
        self._ladders = {layout: self._ladder(layout, config) for layout in self.layouts}
        buckets = [bucket for ladder in self._ladders.values() for bucket in ladder]
        max_rows = max(bucket.num_output_rows for bucket in buckets)
        self.max_model_len = _max_model_len(config.load.max_model_len, model_config)
        self.max_blocks_per_seq = -(-self.max_model_len // config.cache.block_size)
        self.max_masks = self.max_num_seqs + (self.max_extra_rows if drafts else 0)
        self.inboxes = self._make_inboxes(config)
        self.leaves, program = self._load(
            config, model_class, checkpoint, drafter, max_rows, report
        )
        self.cache_spec = program.cache
        on_gpu = self.mesh.devices.flat[0].platform == "gpu"
        self.programs = ProgramCache(
            program,
            self.mesh,
            program_store.default_directory(),
            processes=min(MAX_PROCESSES, (os.cpu_count() or 1) // 2) if on_gpu else 0,
        )
        self.num_blocks = self._number_of_blocks(config.cache)
        vocab_size = model_config.vocab_size
        state = SamplerState.zeros(self.max_num_seqs, vocab_size, self.max_masks)
        self._num_drafted = program.num_drafted
        width = StepOutput.width(config.scheduler.max_logprobs, self._num_drafted)
        output = np.zeros((max_rows, width), np.int32)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        self.state, self._output = jax.device_put((state, output), replicated)
        self.packer = self._new_packer()
        self._rows, self._masks = SamplerRows(vocab_size), GrammarMasks(vocab_size)
        decode = [bucket for bucket in buckets if bucket.max_query_len == 1]
        largest = max(packed_size(bucket, self.max_blocks_per_seq) for bucket in decode)
        self._guards = _set_room_aside(4 * max(largest, output.size), self.mesh)
        self.crossover = self._find_crossover(parallel.shift_parallel_threshold, report)
        self.picker = LayoutPicker(self._ladders, self.crossover.threshold)
        self._moves: list[list[int]] = []  # of tokens in the cache, before the next step
        self._compile(self.picker.steps, report, "Compiling step programs")
        self.programs.close()
        self._warm_up()
        self._followers: Followers | None = None
        if self.nodes.count > 1 and self.nodes.rank == 0:
            self._followers = Followers(self.nodes, parallel.master_addr)
            atexit.register(self._followers.close)
        elif self.nodes.count > 1:
            self.leader = Leader(self.nodes, parallel.master_addr)

    def launch(self, scheduled: ScheduledBatch) -> LaunchedStep:
        """Start a step; its results are still on their way."""
        rows = [
            (part.request.slot, *row)
            for part in scheduled.requests
            if part.request.params.adjusts_logits
            and part.samples
            and (row := self._rows.changed(part.request)) is not None
        ]
        masks = list(self._masks.fill(scheduled))
        layout, bucket = self.picker.pick(scheduled)
        packed = self.packer.pack(scheduled, bucket)
        moves, self._moves = np.array(self._moves, np.int32).reshape(-1, 2), []
        launch = Launch(-1, rows, masks, packed, moves)
        launched = time.perf_counter()
        if self._followers is not None:
            step = self.picker.steps.index((layout, bucket))
            self._followers.send(replace(launch, step=step))
        output = self._execute(layout, bucket, launch)
        host_copies.start(output)
        tokens = bucket.num_tokens * bucket.num_rounds
        stride, drafted = bucket.num_rows, self._num_drafted
        return LaunchedStep(scheduled, layout, tokens, launched, output, stride, drafted)

    def keep_accepted(self, parts: Iterable[ScheduledRequest]) -> None:
        """Have the accepted tokens of trees moved to where those of a path would be.

        With the next launch, before its step: until then nobody can have written to these slots,
        and no block is found that has some of them.
        """
        size = self.cache_spec.block_size
        for part in parts:
            blocks = part.request.block_ids
            for move in part.moves:
                self._moves.append([blocks[i // size] * size + i % size for i in move])

    def follow(self) -> None:
        """Run what node 0 launches, until it ends: the whole work of every other node.

        Raises:
            EngineDeadError: node 0 is lost.
        """
        steps = self.picker.steps
        while (launch := self.leader.receive()) is not None:
            self._execute(*steps[launch.step], launch)

    def failure(self, seconds: float = 0.0) -> str | None:
        """Return why no step can succeed any more, waiting so long for bad news of other nodes."""
        return self._followers.failed(seconds) if self._followers is not None else None

    def _execute(self, layout: MeshLayout, bucket: Bucket, launch: Launch) -> jax.Array:
        """Start a step on this node. Nothing but this may change what the devices hold."""
        for row in launch.rows:
            self.state = self.programs.set_row(self.state, *row)
        for masks in launch.masks:
            self.state = self.programs.set_masks(self.state, *masks)
        with self._alone():
            if len(launch.moves):
                self.caches = self.programs.move(self.caches, launch.moves)
            return self._start(layout, bucket, launch.packed)

    def forget(self, request: Request) -> None:
        """Drop what is remembered of an ended request."""
        self._rows.forget(request)

    def _ladder(self, layout: MeshLayout, config: EngineConfig) -> tuple[Bucket, ...]:
        """Return the shapes that steps of a layout can have."""
        sharing = config.parallel.ulysses_sequence_parallel_size if layout.tokens else 1
        # On CPUs a product of one row in 16-bit floats takes ten times as long as one of two.
        is_slow_alone = jax.default_backend() == "cpu" and self.dtype.itemsize == 2
        return bucket_ladder(
            self.max_num_seqs,
            self.limits.max_num_batched_tokens,
            self.max_extra_rows,
            sharing,
            config.speculative.max_draft_len,
            config.speculative.suffix_use_tree_spec,
            config.speculative.drafts_on_device,
            least=2 if is_slow_alone else 1,
            num_rounds=self.num_rounds,
        )

    def _rounds(self, config: EngineConfig, model_class: type[LlamaForCausalLM]) -> int:
        """Return what was asked for; or several where a GPU is done with one before the host is.

        Beside a network that drafts, not unless asked: there a round took 2.3 ms, for reasons
        unknown yet (benchmarks/results/h200/speculation_rounds.json).
        """
        wanted, speculative = config.scheduler.num_scheduler_steps, config.speculative
        if speculative.drafts_on_host and (wanted or 1) > 1:
            raise ValueError(
                f"num_scheduler_steps must be 1 where the host makes drafts, got {wanted}"
            )
        on_gpu = self.mesh.devices.flat[0].platform == "gpu"
        if wanted or speculative.model or not on_gpu or self.mesh.size > 1:
            return wanted or 1
        model = nnx.eval_shape(lambda: model_class(self.model_config, 1, None))
        num_bytes = self.dtype.itemsize * sum(leaf.size for leaf in jax.tree.leaves(model))
        return rounds.by_default(num_bytes, self.model_config.num_hidden_layers)

    def _load(
        self,
        config: EngineConfig,
        model_class: type[LlamaForCausalLM],
        checkpoint: Checkpoint | OrbaxCheckpoint | None,
        drafter: DrafterFiles | None,
        max_rows: int,
        report: Report,
    ) -> tuple[Placed, StepProgram]:
        """Place the weights of the model and its drafter; say what a step computes with them."""
        model_config, implementation = self.model_config, config.load.implementation
        num_shards = config.parallel.num_devices
        if isinstance(checkpoint, OrbaxCheckpoint):
            num_shards = checkpoint.num_shards(num_shards)
        model = nnx.eval_shape(lambda: model_class(model_config, num_shards, implementation))
        loader = WeightLoader(self.mesh, self.layouts, self.dtype, config.load.seed, report)
        leaves, stacks = loader.load(model, checkpoint, "weights")
        heads = PartitionSpec(None, None, self.layouts[-1].devices or None)
        layers, head_dim = model_config.num_cache_layers, model_config.head_dim
        caches: list[ModelCacheSpec | TokenCacheSpec] = [
            ModelCacheSpec(layers, model.num_kv_groups, head_dim, heads)
        ]
        drafting = drafter.drafting if drafter else None
        if drafter is not None:
            module = drafter.drafting.module(num_shards, implementation)
            caches += drafter.drafting.caches()
            added, others = loader.load(
                module, drafter.checkpoint, "drafter weights", drafter.drafting.layout
            )
            leaves = {layout: leaves[layout] + added[layout] for layout in self.layouts}
            stacks = stacks.followed_by(others)
        return leaves, StepProgram(
            model_class,
            model_config,
            num_shards,
            implementation,
            stacks,
            KVCacheSpec(tuple(caches), config.cache.block_size, self.dtype),
            self.max_blocks_per_seq,
            self.max_num_seqs,
            self.max_masks,
            max_rows,
            config.scheduler.max_logprobs,
            config.speculative.max_draft_len,
            self.num_rounds,
            drafting,
            has_inboxes=self.inboxes is not None,
        )

    def _make_inboxes(self, config: EngineConfig) -> Inboxes | None:
        """Let the devices write to each other, where they can and may."""
        reason = Inboxes.unavailable(self.mesh)
        if config.parallel.disable_custom_all_reduce or config.load.implementation == "xla":
            reason = "it is not wanted"
        if reason is None:
            return Inboxes(self.mesh)
        if self.mesh.size > 1:
            logger.info("No kernel of ours sums over the devices: %s", reason)
        return None

    def _new_packer(self) -> StepPacker:
        return StepPacker(
            self.max_num_seqs,
            self.max_blocks_per_seq,
            self.cache_spec.block_size,
            self.model_config.vocab_size,
            len(self._output),
            self._num_drafted,
        )

    def _compile(
        self, steps: Collection[tuple[MeshLayout, Bucket]], report: Report, what: str
    ) -> None:
        """Compile programs, then make the caches, which are empty.

        In this order: XLA tries variants of products, in memory that the caches would take.
        """
        self.caches: KVCaches = ()
        self.programs.compile(steps, self.num_blocks, counted(report, what, len(steps)))
        self.caches = self.cache_spec.allocate(self.num_blocks, self.mesh)

    def _start(self, layout: MeshLayout, bucket: Bucket, packed: np.ndarray) -> jax.Array:
        """Start a program; return its packed `StepOutput`."""
        leaves, inboxes = self.leaves[layout], self.inboxes and self.inboxes.addresses
        self.caches, self.state, self._output = self.programs.run(
            layout, bucket, leaves, inboxes, self.caches, self.state, self._output, packed
        )
        return self.programs.copy(self._output)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other program run where two would wait for each other.

        Forced CPU devices share threads, and each device's part of a collective keeps one.
        """
        if jax.default_backend() != "cpu" or self.mesh.size == 1:
            yield
            return
        with _cpu_collectives:
            yield
            self._output.block_until_ready()

    def _find_crossover(self, threshold: int | None, report: Report) -> Crossover:
        """Return the one that the user set, that was measured at an earlier start, or is now.

        Node 0 decides, as all nodes must take the same layout.
        """
        if threshold is not None or len(self.layouts) == 1:
            return Crossover(threshold or 0)
        known = self._crossover_store().load() if self.nodes.rank == 0 else None
        if json.loads(self.nodes.firsts(json.dumps(known is not None))):
            known = known or Crossover(0)
        else:
            known = self._measure_crossover(report)
        found = json.loads(self.nodes.firsts(json.dumps(asdict(known))))
        return Crossover.of(found["tokens"], found["few_ms"], found["many_ms"])

    def _crossover_store(self) -> CrossoverStore:
        return CrossoverStore(
            program_store.environment(self.mesh.devices.flatten().tolist()),
            *(self.mesh.shape, self.model_config, self.dtype, self.limits, self.max_model_len),
            self.inboxes is not None,
        )

    def measure_crossover(self, report: Report = silent) -> Crossover:
        """Time steps of both layouts and keep what is found on disk; while nothing runs.

        Raises:
            ValueError: other nodes would have to take part.
        """
        if self.nodes.count > 1:
            raise ValueError("with several nodes, layouts are measured at the start only")
        try:
            return self._measure_crossover(report)
        finally:
            self.programs.close()

    def _measure_crossover(self, report: Report) -> Crossover:
        few, many = self.layouts
        multiple = self.mesh.shape["sp"]
        counts = tokens_to_measure(multiple, self.limits.max_num_batched_tokens)
        blocks = min(self.max_blocks_per_seq, self.num_blocks)
        steps = {}
        for layout, count in itertools.product(self.layouts, counts):
            scheduled = probe(count, self.limits, self.max_model_len, blocks)
            bucket = Bucket.fit(scheduled, self._ladders[layout])
            steps[layout, count] = bucket, self._new_packer().pack(scheduled, bucket)
        programs = {(layout, bucket) for (layout, _), (bucket, _) in steps.items()}
        self._compile(programs, report, "Compiling programs to measure")
        self.nodes.everyones("ready to measure")
        times = {layout: [] for layout in self.layouts}
        advance = counted(report, "Measuring layouts", len(steps))
        for (layout, _), (bucket, packed) in steps.items():
            times[layout].append(self._milliseconds(layout, bucket, packed))
            advance()
        crossover = Crossover.of(counts, times[few], times[many])
        if self.nodes.rank == 0:
            self._crossover_store().save(crossover)
        return crossover

    def _warm_up(self) -> None:
        """Run every program: on a GPU the first runs make its graph, which takes some 10 ms."""
        self.nodes.everyones("ready")
        if self.mesh.devices.flat[0].platform == "gpu":
            scheduled = probe(1, self.limits, self.max_model_len, 1)
            for layout, bucket in self.picker.steps:
                packed = self._new_packer().pack(scheduled, bucket)
                for _ in range(2):
                    self._start(layout, bucket, packed)
            if any(bucket.has_trees for _, bucket in self.picker.steps):
                self.caches = self.programs.move(self.caches, np.zeros((1, 2), np.int32))
            jax.block_until_ready((self._output, self.caches))

    def _milliseconds(self, layout: MeshLayout, bucket: Bucket, packed: np.ndarray) -> float:
        """Median time of a step."""
        elapsed = []
        for _ in range(7):
            start = time.perf_counter()
            self._start(layout, bucket, packed).block_until_ready()
            elapsed.append((time.perf_counter() - start) * 1e3)
        return statistics.median(elapsed[2:])

    def _number_of_blocks(self, cache: CacheConfig) -> int:
        """Return how many blocks the cache has, the same on all nodes."""
        wanted = cache.num_blocks or self._blocks_that_fit(cache)
        count = min(map(int, self.nodes.everyones(str(wanted))))
        if count < self.max_blocks_per_seq:
            raise ValueError(
                f"max_model_len={self.max_model_len} needs {self.max_blocks_per_seq} blocks of "
                f"the cache, there is room for {count} ({count * cache.block_size} tokens); set a "
                "smaller max_model_len or give the cache more memory"
            )
        return count

    def _blocks_that_fit(self, cache: CacheConfig) -> int:
        """Size the cache: a share of the memory, on a GPU what weights and programs leave."""
        most = self.max_num_seqs * self.max_blocks_per_seq
        per_device = self.cache_spec.bytes_per_device(self.mesh)
        device = self.mesh.local_devices[0]
        stats = device.memory_stats() if device.platform == "gpu" else None
        if stats is None:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            budget = int(memory * cache.cpu_memory_share)
            return min(most, budget // (per_device * self.mesh.size))
        layout = self.layouts[-1]
        largest = self._ladders[layout][-1]
        workspace = self.programs.workspace_bytes(layout, largest, self.max_blocks_per_seq)
        workspace -= self.max_blocks_per_seq * per_device  # the cache itself is among the outputs
        vocab_size = self.model_config.vocab_size
        state = SamplerState.bytes(self.max_num_seqs, vocab_size, self.max_masks)
        free = int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
        budget = free - state - int(1.2 * workspace)
        # Stored programs have this number in their shapes, and free memory differs a little from
        # start to start.
        return min(most, budget // per_device // 64 * 64)


def _set_room_aside(size: int, mesh: Mesh) -> list[jax.Array]:
    """Leave holes of `size` bytes in the devices' memory; return what keeps them apart.

    Every step allocates an array for its input and one for its output. The allocator takes the
    smallest free piece that is large enough. Without these holes that can be a part of where the
    step's intermediate results lay, which then move, and the host must change every node of the
    step's CUDA graph.
    """
    if mesh.devices.flat[0].platform != "gpu":
        return []
    replicated = NamedSharding(mesh, PartitionSpec())
    holes, guards = [], []
    for _ in range(8):
        holes.append(jax.device_put(np.zeros(size, np.uint8), replicated))
        guards.append(jax.device_put(np.zeros(1, np.uint8), replicated))
    jax.block_until_ready((holes, guards))
    return guards


def _max_model_len(wanted: int | None, model_config: ModelConfig) -> int:
    """Return the longest sequence: what is wanted, if positions so high mean something."""
    longest, rope = model_config.max_position_embeddings, model_config.rope
    if rope.type in ("linear", "yarn"):
        longest = max(longest, int(rope.factor * rope.original_max_position_embeddings))
    if wanted is not None and wanted > longest:
        raise ValueError(f"max_model_len={wanted} is more than the model's {longest} positions")
    return wanted or model_config.max_position_embeddings


def _compute_dtype(dtype: str, model_config: ModelConfig) -> jnp.dtype:
    """Resolve "auto": GPUs are made for 16 bits; on a CPU answers do not depend on the batch."""
    if dtype == "auto" and jax.default_backend() == "cpu":
        dtype = "float32"
    elif dtype == "auto":
        stored = model_config.checkpoint_dtype
        dtype = "bfloat16" if stored == "float32" else stored
    return jnp.dtype(dtype)
