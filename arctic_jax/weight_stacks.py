"""Weights of one shape in one array, so that a step program has few arguments.

A launch costs the host some 0.7 us for each argument and device: with six parameters a layer, half
a millisecond of a step on four GPUs. So parameters of one shape lie one below the other in one
array, from which a program slices them. On a GPU such a slice is no copy: kernels and cuBLAS are
called with its address (XLA's dynamic-slice fusions). On a CPU every product would get a copy, and
each parameter stays an array of its own.

The rows of one device, with two layouts (`weight_views.py`):

    coarse: layer 0 | s = 0 | s = 1 |      fine, on s = 1:      | s = 1 |  layer 0: rows 0 ...
            layer 1 | s = 0 | s = 1 |      a view that begins   | s = 0 |
                                           at its own rows      | s = 1 |  layer 1: `stride` on
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax import weight_views
from arctic_jax.shift_parallel import MeshLayout

ALIGNMENT = 256
"""Bytes. XLA copies slices that do not begin and end at a multiple of so many."""
FEWEST = 3
"""Parameters of a stack. So an output matrix stays apart from the embedding, of which XLA would
perhaps copy what it gathers a few rows from."""


@dataclass(frozen=True)
class Stack:
    """Parameters that are one array.

    Attributes:
        members: which, by their places among all parameters.
        shape: of each, global.
        dtype: of each.
        partitions: where they lie in each layout; nothing but the first dimension is split.
        rows: of each, on a device, in each layout.
    """

    members: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: jnp.dtype
    partitions: Mapping[MeshLayout, PartitionSpec]
    rows: Mapping[MeshLayout, int]

    @property
    def stride(self) -> int:
        """Rows on a device from one parameter to the next: in all layouts those of the coarsest."""
        return max(self.rows.values())

    def height(self, layout: MeshLayout) -> int:
        """Rows of the array on a device."""
        return (len(self.members) - 1) * self.stride + self.rows[layout]

    def abstract(self, layout: MeshLayout, mesh: Mesh) -> Any:
        """Return the array's shape, global, and its sharding."""
        shards = self.shape[0] // self.rows[layout]
        shape = (shards * self.height(layout), *self.shape[1:])
        sharding = NamedSharding(mesh, self.partitions[layout])
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)

    def finer(
        self, array: Array, coarse: MeshLayout, fine: MeshLayout, mesh: Mesh
    ) -> tuple[Array, int]:
        """Return the array in the layout that splits it further, and bytes copied.

        Raises:
            ValueError: a device would need rows that it does not have.
        """
        has, needs = (
            NamedSharding(mesh, self.partitions[layout]).addressable_devices_indices_map(self.shape)
            for layout in (coarse, fine)
        )
        if has == needs:
            return array, 0
        begins = {}
        for device, index in needs.items():
            start, stop, _ = (index or (slice(None),))[0].indices(self.shape[0])
            first, last, _ = (has[device] or (slice(None),))[0].indices(self.shape[0])
            if not first <= start <= stop <= last:
                raise ValueError(
                    f"{device} has rows {first}:{last} of {self.shape}, "
                    f"{self.partitions[fine]} gives it {start}:{stop}"
                )
            begins[device] = start - first
        wanted = self.abstract(fine, mesh)
        return weight_views.rows(array, wanted.shape, wanted.sharding, begins)


@dataclass(frozen=True)
class WeightStacks:
    """How the parameters of an engine's modules lie in arrays.

    Attributes:
        stacks: the arrays; together they have every parameter once.
    """

    stacks: tuple[Stack, ...]

    @classmethod
    def plan(
        cls,
        shapes: Sequence[tuple[int, ...]],
        partitions: Mapping[MeshLayout, Sequence[PartitionSpec]],
        dtypes: Sequence[jnp.dtype],
        mesh: Mesh,
        together: bool | None = None,
    ) -> WeightStacks:
        """Stack parameters that are alike.

        Args:
            shapes: of the parameters, global.
            partitions: in each layout, of each parameter.
            dtypes: of each parameter.
            mesh: the devices.
            together: whether to stack any; `None`: on GPUs.
        """
        if together is None:
            together = mesh.devices.flat[0].platform == "gpu"
        alike: dict[object, list[int]] = {}
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            lies = tuple(partitions[layout][i] for layout in partitions)
            alike.setdefault((shape, dtype, lies), []).append(i)
        stacks = []
        for first, *others in alike.values():
            shape, dtype = shapes[first], dtypes[first]
            lies = {layout: partitions[layout][first] for layout in partitions}
            rows = {at: NamedSharding(mesh, lies[at]).shard_shape(shape)[0] for at in lies}
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            fit = all(count * row_bytes % ALIGNMENT == 0 for count in rows.values())
            if together and fit and len(others) + 1 >= FEWEST:
                groups = [(first, *others)]
            else:
                groups = [(i,) for i in (first, *others)]
            stacks += [Stack(members, shape, dtype, lies, rows) for members in groups]
        stacks.sort(key=lambda stack: stack.members)
        return cls(tuple(stacks))

    def followed_by(self, other: WeightStacks) -> WeightStacks:
        """Return how these parameters and then those of `other` lie."""
        count = sum(len(stack.members) for stack in self.stacks)
        moved = (
            replace(stack, members=tuple(count + i for i in stack.members))
            for stack in other.stacks
        )
        return replace(self, stacks=(*self.stacks, *moved))

    def partitions(self, layout: MeshLayout) -> tuple[PartitionSpec, ...]:
        """Where each array lies."""
        return tuple(stack.partitions[layout] for stack in self.stacks)

    def abstract(self, layout: MeshLayout, mesh: Mesh) -> tuple[Any, ...]:
        """Return each array's shape, global, and its sharding."""
        return tuple(stack.abstract(layout, mesh) for stack in self.stacks)

    def fill(
        self, parameters: Iterable[Array], layout: MeshLayout, mesh: Mesh
    ) -> tuple[Array, ...]:
        """Make the arrays of parameters that come one by one, in their order.

        Arrays of several are there before the first parameter, and no parameter of theirs is kept:
        so nothing is left that would divide the device's memory.
        """
        arrays: list[Array | None] = [
            _zeros(stack.abstract(layout, mesh)) if len(stack.members) > 1 else None
            for stack in self.stacks
        ]
        places = {
            member: (i, j)
            for i, stack in enumerate(self.stacks)
            for j, member in enumerate(stack.members)
        }
        for member, parameter in enumerate(parameters):
            i, j = places[member]
            array, stack = arrays[i], self.stacks[i]
            if array is None:
                arrays[i] = parameter
            else:
                begin = np.int32(j * stack.stride)
                arrays[i] = _write(array, parameter, begin, mesh, stack.partitions[layout])
        return tuple(array for array in arrays if array is not None)

    def finer(
        self, arrays: Sequence[Array], coarse: MeshLayout, fine: MeshLayout, mesh: Mesh
    ) -> tuple[tuple[Array, ...], int]:
        """Return the arrays in the layout that splits them further, and bytes copied.

        The results do not keep the memory alive, see `weight_views`.

        Raises:
            ValueError: a device would need rows that it does not have.
        """
        views = [
            stack.finer(array, coarse, fine, mesh)
            for stack, array in zip(self.stacks, arrays, strict=True)
        ]
        return tuple(view for view, _ in views), sum(copied for _, copied in views)

    def parameters(self, arrays: Sequence[Array], layout: MeshLayout) -> tuple[Array, ...]:
        """Slice a device's parameters from its part of the arrays: the beginning of a program."""
        found: dict[int, Array] = {}
        for stack, array in zip(self.stacks, arrays, strict=True):
            rows = stack.rows[layout]
            for i, member in enumerate(stack.members):
                begin = i * stack.stride
                found[member] = jax.lax.slice_in_dim(array, begin, begin + rows)
        return tuple(found[member] for member in range(len(found)))


def _zeros(array: jax.ShapeDtypeStruct) -> Array:
    return jax.jit(lambda: jnp.zeros(array.shape, array.dtype), out_shardings=array.sharding)()


@functools.partial(jax.jit, static_argnames=("mesh", "partition"), donate_argnames="array")
def _write(
    array: Array, parameter: Array, begin: Array, mesh: Mesh, partition: PartitionSpec
) -> Array:
    """Put a parameter into an array, in place: each device its rows, from `begin` on."""
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    everywhere = PartitionSpec()
    return jax.shard_map(
        update, mesh=mesh, in_specs=(partition, partition, everywhere), out_specs=partition
    )(array, parameter, begin)
