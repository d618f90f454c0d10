"""The weights of an engine's modules, placed for all its layouts. Engine start only."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax import weight_views, weights
from arctic_jax.engine.step_program import Leaves
from arctic_jax.loading.orbax_checkpoint import OrbaxCheckpoint
from arctic_jax.models.layers import named_parameters
from arctic_jax.progress import Report, counted
from arctic_jax.shift_parallel import MeshLayout
from arctic_jax.weights import Checkpoint, ParameterSpec, Source

logger = logging.getLogger(__name__)

Placed = dict[MeshLayout, Leaves]
Partitions = dict[MeshLayout, tuple[PartitionSpec, ...]]


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
        dtype: of all weights.
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
    ) -> tuple[Placed, Partitions]:
        """Place a module's weights, random ones without a checkpoint.

        Args:
            module: without parameters.
            checkpoint: where they come from.
            what: for the progress bar.
            layout: in which they lie in all of the engine's layouts; `None` for those.

        Returns:
            The flat tuple of its leaves for each layout, and where they lie.

        Raises:
            CheckpointError: see `weights.load`.
        """
        named = named_parameters(module)
        axes = [variable.get_metadata("axis") for variable in named.values()]
        partitions = {at: tuple(map((layout or at).partition, axes)) for at in self.layouts}
        parameters = {
            path: ParameterSpec(variable.shape, self.dtype, partition)
            for (path, variable), partition in zip(
                named.items(), partitions[self.layouts[-1]], strict=True
            )
        }
        advance = counted(self.report, f"Loading {what}", len(parameters))
        start = time.perf_counter()
        if checkpoint is None:
            placed = weights.random(parameters, self.mesh, self.seed, advance)
        elif isinstance(checkpoint, OrbaxCheckpoint):
            placed = checkpoint.restore(parameters, self.mesh, advance)
        else:
            placed = weights.load(
                parameters, module.weight_sources(), checkpoint, self.mesh, advance
            )
        if checkpoint is not None:
            gigabytes = sum(array.nbytes for array in jax.block_until_ready(placed).values()) / 1e9
            seconds = time.perf_counter() - start
            rate = gigabytes / seconds
            logger.info(
                "loaded %.2f GB of %s in %.1f s (%.1f GB/s)", gigabytes, what, seconds, rate
            )
        leaves = {self.layouts[-1]: tuple(placed[path] for path in parameters)}
        if len(self.layouts) == 2:
            few, many = self.layouts
            leaves[few] = self._finer(leaves[many], partitions[few])
        return leaves, partitions

    def _finer(self, leaves: Leaves, partitions: Sequence[PartitionSpec]) -> Leaves:
        """Return the weights in the layout for few tokens: no second copy, see `weight_views`."""
        views, copied = [], 0
        for leaf, partition in zip(leaves, partitions, strict=True):
            view, nbytes = weight_views.finer(leaf, NamedSharding(self.mesh, partition))
            views.append(view)
            copied += nbytes
        if copied:
            logger.info("shift parallelism: %.1f MB of weights are copied", copied / 1e6)
        return tuple(views)
