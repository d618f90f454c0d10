"""The weights of an engine's modules, placed for all its layouts. Engine start only."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from arctic_jax import weights
from arctic_jax.engine.step_program import Leaves
from arctic_jax.loading.orbax_checkpoint import OrbaxCheckpoint
from arctic_jax.models.layers import dtype_of, named_parameters
from arctic_jax.progress import Report, counted, passing
from arctic_jax.shift_parallel import MeshLayout
from arctic_jax.weight_stacks import WeightStacks
from arctic_jax.weights import Checkpoint, ParameterSpec, Source

logger = logging.getLogger(__name__)

Placed = dict[MeshLayout, Leaves]


class Module(Protocol):
    """A model, or what stands beside one."""

    def weight_sources(self) -> dict[str, Source]:
        """Say, for each parameter's path, which checkpoint tensors it is read from."""
        ...


@dataclass(frozen=True)
class WeightLoader:
    """Places weights.

    Attributes:
        mesh: the devices.
        layouts: of the engine. The weights are placed for the last one, the coarser; the others get
            views of them.
        dtype: of all weights; integers stay what they are.
        seed: of random ones.
        report: told how far loading is.
    """

    mesh: Mesh
    layouts: Sequence[MeshLayout]
    dtype: jnp.dtype
    seed: int
    report: Report

    def load(
        self,
        module: Module,
        checkpoint: Checkpoint | OrbaxCheckpoint | None,
        what: str,
        layout: MeshLayout | None = None,
    ) -> tuple[Placed, WeightStacks]:
        """Place a module's weights, random ones without a checkpoint.

        Args:
            module: without parameters.
            checkpoint: where they come from.
            what: for the progress bar.
            layout: in which they lie in all of the engine's layouts; `None` for those.

        Returns:
            The arrays for each layout, and how its parameters lie in them.

        Raises:
            CheckpointError: see `weights.load`.
        """
        named = named_parameters(module)
        axes = [variable.get_metadata("axis") for variable in named.values()]
        shapes = [variable.shape for variable in named.values()]
        dtypes = [dtype_of(variable, self.dtype) for variable in named.values()]
        partitions = {at: tuple(map((layout or at).partition, axes)) for at in self.layouts}
        coarse = self.layouts[-1]
        stacks = WeightStacks.plan(shapes, partitions, dtypes, self.mesh)
        parameters = {
            path: ParameterSpec(shape, dtype, partition)
            for path, shape, dtype, partition in zip(
                named, shapes, dtypes, partitions[coarse], strict=True
            )
        }
        start = time.perf_counter()
        if checkpoint is None:
            placed = weights.random(parameters, self.mesh, self.seed)
        elif isinstance(checkpoint, OrbaxCheckpoint):
            placed = checkpoint.restore(parameters, self.mesh)
        else:
            placed = weights.load(parameters, module.weight_sources(), checkpoint, self.mesh)
        placed = passing(placed, counted(self.report, f"Loading {what}", len(parameters)))
        arrays = stacks.fill((array for _, array in placed), coarse, self.mesh)
        if checkpoint is not None:
            gigabytes = sum(array.nbytes for array in jax.block_until_ready(arrays)) / 1e9
            seconds = time.perf_counter() - start
            rate = gigabytes / seconds
            logger.info(
                "loaded %.2f GB of %s in %.1f s (%.1f GB/s)", gigabytes, what, seconds, rate
            )
        leaves = {coarse: arrays}
        if len(self.layouts) == 2:
            fine = self.layouts[0]
            leaves[fine], copied = stacks.finer(arrays, coarse, fine, self.mesh)
            if copied:
                logger.info("shift parallelism: %.1f MB of weights are copied", copied / 1e6)
        return leaves, stacks
