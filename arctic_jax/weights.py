"""From checkpoint tensors to placed parameters. Host arrays in, `jax.Array`s out.

Every parameter is stored with its sharded dimension first, so that a device reads its shard as a
range of rows and the shard of a finer layout is a range of rows of the coarser one. A model names,
for each of its parameters, the `Source` that produces such a range from the checkpoint.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax.errors import CheckpointError

ALL_ROWS = slice(None)
READERS = 4
"""Threads that read parameters. Each holds a device's part of one on the host."""


class Checkpoint(Protocol):
    """Named tensors on disk in Hugging Face's names and orientation (`[out, in]`)."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def __iter__(self) -> Iterator[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def read(
        self, name: str, rows: slice = ALL_ROWS, columns: slice = ALL_ROWS
    ) -> np.ndarray[Any, Any]:
        """Read `tensor[rows]`, or `tensor[rows, columns]` of a matrix, and nothing else.

        Any thread may call. The result may be a view of a file: read-only, for a short time.
        """
        ...


@dataclass(frozen=True)
class Overlaid:
    """A checkpoint over another: what the first lacks is the second's."""

    upper: Checkpoint
    lower: Checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self.upper or name in self.lower

    def __iter__(self) -> Iterator[str]:
        yield from self.upper
        yield from (name for name in self.lower if name not in self.upper)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._that_has(name).shape(name)

    def read(
        self, name: str, rows: slice = ALL_ROWS, columns: slice = ALL_ROWS
    ) -> np.ndarray[Any, Any]:
        """See `Checkpoint`."""
        return self._that_has(name).read(name, rows, columns)

    def _that_has(self, name: str) -> Checkpoint:
        return self.upper if name in self.upper else self.lower


class Source(Protocol):
    """Where a parameter's rows come from."""

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint tensors that are read."""
        ...

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return rows `start..stop-1` of the parameter."""
        ...


@dataclass(frozen=True)
class Rows:
    """The tensor as it is; rows past its end (a padded vocabulary) are zero."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """See `Source`."""
        return (self.name,)

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `Source`."""
        end = checkpoint.shape(self.name)[0]
        rows = checkpoint.read(self.name, slice(min(start, end), min(stop, end)))
        missing = max(stop - max(start, end), 0)
        return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows


@dataclass(frozen=True)
class RowBlocks:
    """Tensors of the same shape, one below the other."""

    names: tuple[str, ...]

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `Source`."""
        size = checkpoint.shape(self.names[0])[0]
        parts = []
        for i, name in enumerate(self.names):
            rows = slice(max(start - i * size, 0), max(stop - i * size, 0))
            parts.append(checkpoint.read(name, rows))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Columns:
    """The transposed matrix: `[in, out]` from a checkpoint's `[out, in]`."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """See `Source`."""
        return (self.name,)

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `Source`."""
        return checkpoint.read(self.name, columns=slice(start, stop)).T


@dataclass(frozen=True)
class Transposed:
    """Matrices `[out, in]` transposed, side by side: `[in, outs]`; or biases one after another."""

    names: tuple[str, ...]

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `Source`."""
        if len(checkpoint.shape(self.names[0])) == 1:
            return np.concatenate([checkpoint.read(name) for name in self.names])[start:stop]
        rows = slice(start, stop)
        return np.concatenate([checkpoint.read(name, columns=rows) for name in self.names]).T


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections (or their biases) fused by key/value group.

    Row `g` is `[(heads/groups + 2) * head_dim, ...]`: the query heads of the group, then its key
    head, then its value head. With more groups than key/value heads these are repeated.
    """

    q: str
    k: str
    v: str
    heads: int
    kv_heads: int
    groups: int
    head_dim: int

    @property
    def names(self) -> tuple[str, ...]:
        """See `Source`."""
        return (self.q, self.k, self.v)

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `Source`."""
        width = self.heads // self.groups * self.head_dim
        rows = []
        for group in range(start, stop):
            kv = group * self.kv_heads // self.groups
            kv_rows = slice(kv * self.head_dim, (kv + 1) * self.head_dim)
            parts = [
                checkpoint.read(self.q, slice(group * width, (group + 1) * width)),
                checkpoint.read(self.k, kv_rows),
                checkpoint.read(self.v, kv_rows),
            ]
            rows.append(np.concatenate(parts))
        return np.stack(rows)


@dataclass(frozen=True)
class KV:
    """Key and value projections (or their biases) of several layers, fused by key/value group.

    Row `g` is `[layers, 2 * head_dim, ...]`: of each layer its key head and its value head.

    Attributes:
        k: names of the key projections, one a layer.
        v: of the value projections.
        kv_heads, groups, head_dim: as for `QKV`.
    """

    k: tuple[str, ...]
    v: tuple[str, ...]
    kv_heads: int
    groups: int
    head_dim: int

    @property
    def names(self) -> tuple[str, ...]:
        """See `Source`."""
        return (*self.k, *self.v)

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `Source`."""
        rows = []
        for group in range(start, stop):
            kv = group * self.kv_heads // self.groups
            head = slice(kv * self.head_dim, (kv + 1) * self.head_dim)
            pairs = zip(self.k, self.v, strict=True)
            rows.append(
                np.stack(
                    [np.concatenate([checkpoint.read(n, head) for n in pair]) for pair in pairs]
                )
            )
        return np.stack(rows)


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections (or their biases), fused as `[shards, 2, ffn/shards, ...]`."""

    gate: str
    up: str
    shards: int

    @property
    def names(self) -> tuple[str, ...]:
        """See `Source`."""
        return (self.gate, self.up)

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `Source`."""
        size = checkpoint.shape(self.gate)[0] // self.shards
        pairs = []
        for shard in range(start, stop):
            rows = slice(shard * size, (shard + 1) * size)
            pairs.append(np.stack([checkpoint.read(n, rows) for n in (self.gate, self.up)]))
        return np.stack(pairs)


@dataclass(frozen=True)
class Experts:
    """Row `e`: the projections of expert `e`, `[out, in]` each, one below the other.

    Attributes:
        projections: names with `{}` for the expert's number.
        num_experts: how many there are.
    """

    projections: tuple[str, ...]
    num_experts: int

    @property
    def names(self) -> tuple[str, ...]:
        """See `Source`."""
        return tuple(p.format(e) for e in range(self.num_experts) for p in self.projections)

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `Source`."""
        names = [[p.format(e) for p in self.projections] for e in range(start, stop)]
        return np.stack([np.concatenate([checkpoint.read(n) for n in row]) for row in names])


@dataclass(frozen=True)
class Renamed:
    """A checkpoint whose names begin in another way: `theirs` there, `ours` here."""

    checkpoint: Checkpoint
    theirs: str
    ours: str = ""

    def __contains__(self, name: str) -> bool:
        return name.startswith(self.ours) and self._their_name(name) in self.checkpoint

    def __iter__(self) -> Iterator[str]:
        for name in self.checkpoint:
            if name.startswith(self.theirs):
                yield self.ours + name.removeprefix(self.theirs)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self.checkpoint.shape(self._their_name(name))

    def read(
        self, name: str, rows: slice = ALL_ROWS, columns: slice = ALL_ROWS
    ) -> np.ndarray[Any, Any]:
        """See `Checkpoint`."""
        return self.checkpoint.read(self._their_name(name), rows, columns)

    def _their_name(self, name: str) -> str:
        return self.theirs + name.removeprefix(self.ours)


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter to be placed: global shape, dtype, and the partition of its dimensions."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    partition: PartitionSpec


def load(
    parameters: Mapping[str, ParameterSpec],
    sources: Mapping[str, Source],
    checkpoint: Checkpoint,
    mesh: Mesh,
) -> Iterator[tuple[str, jax.Array]]:
    """Place one parameter after the other on `mesh`; each device reads only its own rows.

    A few are read ahead of the one that is asked for.

    Raises:
        CheckpointError: a tensor is missing, at once; or has another shape than the config says,
            when it is its turn.
    """
    missing = {n for p in parameters for n in sources[p].names if n not in checkpoint}
    if missing:
        shown = ", ".join(sorted(missing)[:5])
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensor(s): {shown}")

    def placed() -> Iterator[tuple[str, jax.Array]]:
        readers = ThreadPoolExecutor(READERS)
        reads: deque[tuple[str, Future[jax.Array]]] = deque()

        def oldest() -> tuple[str, jax.Array]:
            path, read = reads.popleft()
            return path, read.result()

        try:
            for path, spec in parameters.items():
                read = readers.submit(_place, spec, sources[path], checkpoint, mesh)
                reads.append((path, read))
                if len(reads) == 2 * READERS:
                    yield oldest()
            while reads:
                yield oldest()
        finally:
            readers.shutdown(cancel_futures=True)

    return placed()


def _place(spec: ParameterSpec, source: Source, checkpoint: Checkpoint, mesh: Mesh) -> jax.Array:
    sharding = NamedSharding(mesh, spec.partition)
    replicas: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        start, stop, _ = (index or (ALL_ROWS,))[0].indices(spec.shape[0])
        replicas[start, stop].append(device)
    shards = []
    for (start, stop), devices in replicas.items():
        rows = source.read(checkpoint, start, stop)
        if rows.shape != (stop - start, *spec.shape[1:]):
            raise CheckpointError(
                f"{' + '.join(source.names)} gives rows of shape {rows.shape[1:]}, "
                f"the config asks for {spec.shape[1:]}"
            )
        # Waiting keeps what is on the host to one shard a reader.
        shards += jax.block_until_ready(_put(rows, spec.dtype, devices))
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, shards)


def _put(rows: np.ndarray[Any, Any], dtype: jnp.dtype, devices: Sequence[Any]) -> list[jax.Array]:
    """Copy to each device. What is a transpose is transposed there."""
    transposed = rows.ndim == 2 and rows.strides[0] < rows.strides[1]
    host = np.ascontiguousarray(rows.T if transposed else rows, dtype)
    # A file's mapping is no home for parameters: the file may change.
    arrays = [jax.device_put(host, device, may_alias=False) for device in devices]
    return [_transpose(array) for array in arrays] if transposed else arrays


_transpose = jax.jit(jnp.transpose)


def random(
    parameters: Mapping[str, ParameterSpec], mesh: Mesh, seed: int
) -> Iterator[tuple[str, jax.Array]]:
    """Make random weights of the right shapes on the devices: `load_format="dummy"`.

    Matrices are normal with deviation 0.02, vectors are ones: a benchmark only wants the shapes,
    and finite values.
    """
    for i, (path, spec) in enumerate(parameters.items()):
        sharding = NamedSharding(mesh, spec.partition)
        if len(spec.shape) == 1:
            yield path, jax.device_put(jnp.ones(spec.shape, spec.dtype), sharding)
        else:
            make = jax.jit(_normal, static_argnums=(1, 2), out_shardings=sharding)
            yield path, make(jax.random.key(seed * 1_000_003 + i), spec.shape, spec.dtype)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
