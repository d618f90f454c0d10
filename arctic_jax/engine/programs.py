"""The compiled step programs: one for each layout and bucket. Owned by the engine thread.

After `compile` nothing is compiled any more; `run` only looks programs up.
"""

from __future__ import annotations

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
from jax.sharding import Mesh, SingleDeviceSharding
from jax.stages import Compiled

from arctic_jax.engine import memory_maps, sampler
from arctic_jax.engine.lowering import LoweringPool
from arctic_jax.engine.program_store import ProgramStore
from arctic_jax.engine.sampler import SamplerState
from arctic_jax.engine.step_program import MOVES_A_CALL, Leaves, Step, StepProgram, results_of
from arctic_jax.kv_cache import KVCaches
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.scheduled_batch import Bucket
from arctic_jax.shift_parallel import MeshLayout

logger = logging.getLogger(__name__)

COMPILER_OPTIONS = {
    "gpu": {
        # XLA's own products would get copies of the weights' slices (`weight_stacks.py`). They were
        # no faster, and take longer to compile (benchmarks/results/h200/weight_stacks.json).
        "xla_gpu_enable_triton_gemm": False,
        # The first counts the cache twice, as argument and as result, and in vain computes small
        # things anew in every layer to save memory. The second pads 2 to 7 tokens to 8 before every
        # product and cuts its result, two more kernels each, which cuBLAS has no need of.
        "xla_disable_hlo_passes": "rematerialization,cublas-pad-for-gemms",
    }
}
"""By platform."""


class ProgramCache:
    """`(layout, bucket)` to a compiled step.

    Args:
        program: what the steps are made of.
        mesh: the devices.
        directory: where compiled programs are kept for the next start; `None` for nowhere.
        processes: that lower programs; 0 to lower them in this one.
    """

    def __init__(
        self,
        program: StepProgram,
        mesh: Mesh,
        directory: Path | None = None,
        processes: int = 0,
    ) -> None:
        self._program = program
        self._mesh = mesh
        self._processes = processes
        self._pool: LoweringPool | None = None
        self._compiled: dict[tuple[MeshLayout, Bucket], Compiled] = {}
        self._store = ProgramStore(
            directory,
            mesh.devices.flatten().tolist(),
            (program, mesh.shape, dispatch.interpreter()),
        )
        self._set_row = self._set_row_program()
        self._move: Compiled | None = None
        self._set_masks = self._set_masks_program()
        self._copy = self._copy_program()

    def compile(
        self,
        steps: Iterable[tuple[MeshLayout, Bucket]],
        num_blocks: int,
        on_compiled: Callable[[], None] = lambda: None,
    ) -> None:
        """Have a program for every step, from the store or compiled; and for no other.

        `num_blocks` is the same in every call: what an earlier one made is kept.

        Loading, lowering in other processes, and XLA's work run on a few threads; lowering in this
        process is serial.

        Raises:
            OSError: this process has no room for so many programs, see `memory_maps`.
        """
        steps = list(steps)
        found = {step: self._compiled[step] for step in steps if step in self._compiled}
        for _ in found:
            on_compiled()
        missing = [Step(*step, num_blocks) for step in steps if step not in found]
        start = time.perf_counter()
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            jobs = {}
            for step, program in zip(missing, threads.map(self._load, missing), strict=True):
                if program is not None:
                    found[step[:2]] = program
                    on_compiled()
                    continue
                pool = self._pool_of_processes()
                if pool is not None:
                    job = threads.submit(self._compile_lowered_in, pool, step)
                else:
                    lowered = self._program.lower(step, self._mesh)
                    job = threads.submit(self._compile, step, lowered)
                job.add_done_callback(lambda _: on_compiled())
                jobs[step[:2]] = job
            found |= {step: job.result() for step, job in jobs.items()}
        if missing:
            seconds, count = time.perf_counter() - start, len(missing) - len(jobs)
            logger.info("%d programs loaded, %d compiled: %.1f s", count, len(jobs), seconds)
        self._compiled = found
        if self._move is None and any(bucket.has_trees for _, bucket in steps):
            self._move = self._move_program(num_blocks)

    def close(self) -> None:
        """End the processes that lower programs, until there is something to compile again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def workspace_bytes(self, layout: MeshLayout, bucket: Bucket, num_blocks: int) -> int:
        """Temporary memory of one device that the compiled step needs."""
        step = Step(layout, bucket, num_blocks)
        program = self._load(step)
        if program is None:
            self._pool_of_processes()  # the other programs will be missing, too
            program = self._compile(step, self._program.lower(step, self._mesh))
        analysis: Any = program.memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def hlo(self, layout: MeshLayout, bucket: Bucket) -> str:
        """Return a compiled step as XLA prints it, to look at."""
        return str(self._compiled[layout, bucket].as_text())

    def run(
        self,
        layout: MeshLayout,
        bucket: Bucket,
        leaves: Leaves,
        inboxes: Array | None,
        caches: KVCaches,
        state: SamplerState,
        output: Array,
        packed: np.ndarray,
    ) -> tuple[KVCaches, SamplerState, Array]:
        """Start a step; what it returns are futures."""
        return self._compiled[layout, bucket](leaves, inboxes, caches, state, output, packed)

    def copy(self, output: Array) -> Array:
        """Copy a step's output to where the host can read it; the next step writes over it.

        It is the same on all devices; what is copied is that of the first one here, because a
        launch on one costs less of the host's time than one on all.
        """
        return self._copy(output.addressable_data(0))

    def set_row(
        self, state: SamplerState, row: int, seen: np.ndarray, bias: np.ndarray
    ) -> SamplerState:
        """Replace one request's row of the sampler state, which is donated."""
        return self._set_row(state, np.int32(row), seen, bias)

    def move(self, caches: KVCaches, slots: np.ndarray) -> KVCaches:
        """Copy tokens in the caches, which are donated, from slot to slot: `slots [N, 2]`.

        No slot may be read by a later pair than the one that writes it.
        """
        assert self._move is not None, "no step has drafts that are trees"
        for begin in range(0, len(slots), MOVES_A_CALL):
            padded = np.full((2, MOVES_A_CALL), -1, np.int32)
            some = slots[begin : begin + MOVES_A_CALL]
            padded[:, : len(some)] = some.T
            caches = self._move(caches, padded)
        return caches

    def set_masks(
        self, state: SamplerState, first: int, masks: np.ndarray, rows: np.ndarray
    ) -> SamplerState:
        """Make masked biases in the sampler state, which is donated; see `sampler.set_masks`."""
        return self._set_masks(state, np.int32(first), masks, rows)

    def _pool_of_processes(self) -> LoweringPool | None:
        if self._pool is None and self._processes:
            self._pool = LoweringPool(self._program, self._mesh, self._processes)
        return self._pool

    def _compile_lowered_in(self, pool: LoweringPool, step: Step) -> Compiled:
        try:
            lowered = pool.lower(step)
        except RuntimeError as error:
            logger.warning("%s; it is lowered in this process", error)
            lowered = self._program.lower(step, self._mesh)
        return self._compile(step, lowered)

    def _compile(self, step: Step, lowered: jax.stages.Lowered) -> Compiled:
        memory_maps.check(self._platform)
        program = lowered.compile(COMPILER_OPTIONS.get(self._platform))
        self._store.save(step, program)
        return program

    def _load(self, step: Step) -> Compiled | None:
        memory_maps.check(self._platform)
        arguments = self._program.arguments(step, self._mesh)
        return self._store.load(step, arguments, results_of(arguments))

    @property
    def _platform(self) -> str:
        return self._mesh.devices.flat[0].platform

    def _copy_program(self) -> Compiled:
        """Return the program that copies an output.

        On a GPU into the host's memory, as a part of the program: a transfer that the runtime
        starts afterwards comes 0.4 to 1 ms later (benchmarks/results/h200/pinned_output.json).
        """
        output = self._program.output(self._mesh)
        sharding = SingleDeviceSharding(self._mesh.local_devices[0])
        output = jax.ShapeDtypeStruct(output.shape, output.dtype, sharding=sharding)
        if self._platform == "gpu":
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.jit(jnp.copy, out_shardings=sharding).lower(output).compile()

    def _move_program(self, num_blocks: int) -> Compiled:
        function, arguments = self._program.move(num_blocks, self._mesh)
        key = ("move", num_blocks)
        program = self._store.load(key, arguments, arguments[0])
        if program is None:
            program = function.lower(*arguments).compile()
            self._store.save(key, program)
        return program

    def _set_row_program(self) -> Compiled:
        state = self._program.state(self._mesh)
        seen, bias = (
            jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype, sharding=rows.sharding)
            for rows in (state.seen, state.bias)
        )
        return self._state_program(sampler.set_row, state, seen, bias)

    def _set_masks_program(self) -> Compiled:
        state = self._program.state(self._mesh)
        shape = (sampler.MASKS_A_CALL, -(-state.bias.shape[1] // 32))
        masks, rows = (
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=state.bias.sharding)
            for shape in (shape, shape[:1])
        )
        return self._state_program(sampler.set_masks, state, masks, rows)

    def _state_program(
        self, function: Callable[..., SamplerState], state: SamplerState, *values: Any
    ) -> Compiled:
        """Return the program that puts `values` at a row of the sampler state."""
        row = jax.ShapeDtypeStruct((), jnp.int32, sharding=state.seen.sharding)
        arguments = (state, row, *values)
        program = self._store.load(function.__name__, arguments, state)
        if program is None:
            program = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
            self._store.save(function.__name__, program)
        return program
