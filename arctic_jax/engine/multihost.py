"""One engine over several machines: every node runs the same programs in the same order.

Node 0 schedules and has the requests. What it launches it first sends to the other nodes, which
follow; a program's collectives then meet on all of them. Results are the same on every node, and
node 0 reads its own. Nodes find each other by `jax.distributed`; launches go over TCP connections
of our own, as a step must not wait for a key/value store.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import itertools
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from arctic_jax.config import EngineConfig, ParallelConfig
from arctic_jax.engine import program_store
from arctic_jax.errors import EngineDeadError

logger = logging.getLogger(__name__)

START_SECONDS = 3600
"""That a node waits for the others while they load and compile."""
CONNECT_SECONDS = 60.0
_NONCE = 32
_LENGTH = struct.Struct("<q")
_END = -1
_calls = itertools.count()

Change = tuple[int, np.ndarray, np.ndarray]
"""Of the sampler's state: where, and two arrays."""


def join(parallel: ParallelConfig) -> None:
    """Meet the other nodes, before JAX looks for devices; once in a process.

    Raises:
        RuntimeError: JAX has been used already, or the other nodes did not come.
    """
    if parallel.nnodes == 1 or jax.distributed.is_initialized():
        return
    # When a node is lost, we end the others: JAX would abort them, a hundred seconds later.
    jax.config.update("jax_enable_recoverability", True)
    address = f"{parallel.master_addr}:{parallel.master_port}"
    jax.distributed.initialize(
        address, parallel.nnodes, parallel.node_rank, coordinator_bind_address=address
    )


class Nodes:
    """What the nodes tell each other while they start. Each asks the same, in the same order.

    Args:
        parallel: how many there are, and which one this is.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        self.count = parallel.nnodes
        self.rank = parallel.node_rank

    def everyones(self, value: str) -> list[str]:
        """Return what each node says, when all have said it."""
        if self.count == 1:
            return [value]
        client = _key_value_store()
        name = f"arctic_jax/{next(_calls)}"
        client.key_value_set(f"{name}/{self.rank}", value)
        wait = START_SECONDS * 1000
        return [client.blocking_key_value_get(f"{name}/{i}", wait) for i in range(self.count)]

    def firsts(self, value: str) -> str:
        """Return what node 0 says."""
        return self.everyones(value)[0]

    def check(self, config: EngineConfig, *more: object) -> None:
        """See that all nodes were told the same.

        Args:
            config: what the user set.
            more: whatever else must be equal, with telling `repr`s.

        Raises:
            ValueError: the options differ, or this engine leaves devices out.
        """
        if self.count == 1:
            return
        devices, used = jax.device_count(), config.parallel.num_devices
        if devices != used:
            raise ValueError(
                f"tensor_parallel_size times ulysses_sequence_parallel_size is {used}, and the "
                f"{self.count} nodes have {devices} devices: all must be used"
            )
        # Files may lie elsewhere on each node.
        same = replace(
            config,
            parallel=replace(config.parallel, node_rank=0),
            load=replace(config.load, model="", tokenizer=None),
            scheduler=replace(config.scheduler, step_log=None),
        )
        mine = [repr(part) for part in (program_store.versions(), same, *more)]
        first = self.firsts("\n".join(mine)).split("\n")
        for here, there in zip(mine, first, strict=True):
            if here != there:
                raise ValueError(f"node {self.rank} was told {here}, node 0 was told {there}")


@dataclass(frozen=True)
class Launch:
    """One step, as every node runs it.

    Attributes:
        step: number of the program among those that can be picked; for the other nodes.
        rows: of the sampler's state that change before: what `ProgramCache.set_row` takes.
        masks: that are written before: what `ProgramCache.set_masks` takes.
        packed: the step's input.
        moves: `[N, 2]` of tokens in the cache, before the step: what `ProgramCache.move` takes.
    """

    step: int
    rows: Sequence[Change]
    masks: Sequence[Change]
    packed: np.ndarray
    moves: np.ndarray

    def to_bytes(self) -> bytes:
        """Return it as arrays in numpy's own format, one after the other."""
        changes = (*self.rows, *self.masks)
        where = [index for index, _, _ in changes]
        file = io.BytesIO()
        np.save(file, np.array([self.step, len(self.rows), *where]))
        arrays = (array for change in changes for array in change[1:])
        for array in (*arrays, self.packed, self.moves):
            np.save(file, array, allow_pickle=False)
        return file.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Launch:
        """Read what `to_bytes` wrote."""
        file = io.BytesIO(data)
        step, num_rows, *where = _load(file).tolist()
        changes = [(index, _load(file), _load(file)) for index in where]
        rows, masks = changes[:num_rows], changes[num_rows:]
        return Launch(step, rows, masks, _load(file), _load(file))


def _load(file: io.BytesIO) -> np.ndarray:
    return np.load(file, allow_pickle=False)


class Followers:
    """The other nodes, as node 0 sees them.

    Args:
        nodes: all of them; they call `connect` meanwhile.
        address: of node 0, on which it listens until all have come.
    """

    def __init__(self, nodes: Nodes, address: str) -> None:
        self._lost = threading.Event()
        self.failure: str | None = None
        """Why no step can be launched any more."""
        self._connections: dict[int, socket.socket] = {}
        key = secrets.token_bytes(_NONCE)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as listener:
            listener.settimeout(CONNECT_SECONDS)
            nodes.firsts(f"{listener.getsockname()[1]} {key.hex()}")
            while len(self._connections) < nodes.count - 1:
                connection, where = listener.accept()
                rank = _recognize(connection, key)
                if rank is None or rank in self._connections:
                    logger.warning("%s is none of the nodes and was turned away", where[0])
                    connection.close()
                    continue
                self._connections[rank] = connection
        for rank, connection in self._connections.items():
            threading.Thread(target=self._watch, args=(rank, connection), daemon=True).start()

    def send(self, launch: Launch) -> None:
        """Let the others run a step.

        Raises:
            EngineDeadError: one is gone.
        """
        data = launch.to_bytes()
        try:
            for connection in self._connections.values():
                connection.sendall(_LENGTH.pack(len(data)) + data)
        except OSError:
            self._lost.wait(1.0)
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    def failed(self, seconds: float) -> str | None:
        """Return why a step has failed, if it is for a node's loss; that may take a moment."""
        self._lost.wait(seconds)
        return self.failure

    def close(self) -> None:
        """Let the others end."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(_LENGTH.pack(_END))
                connection.close()

    def _watch(self, rank: int, connection: socket.socket) -> None:
        """Wait for a node's end: it says nothing as long as it lives."""
        with contextlib.suppress(OSError):
            connection.recv(1)
        connection.close()
        self.failure = self.failure or f"node {rank} is lost"
        self._lost.set()


class Leader:
    """Node 0, as another node sees it.

    Args:
        nodes: all of them.
        address: of node 0.

    Raises:
        OSError: it cannot be reached.
    """

    def __init__(self, nodes: Nodes, address: str) -> None:
        port, key = nodes.firsts("").split()
        self._connection = socket.create_connection((address, int(port)), CONNECT_SECONDS)
        nonce = _receive(self._connection, _NONCE)
        proof = hmac.digest(bytes.fromhex(key), nonce, "sha256")
        self._connection.sendall(_LENGTH.pack(nodes.rank) + proof)
        self._connection.settimeout(None)
        _prepare(self._connection)

    def receive(self) -> Launch | None:
        """Return the next step; `None` if there will be none.

        Raises:
            EngineDeadError: node 0 is gone.
        """
        try:
            (length,) = _LENGTH.unpack(_receive(self._connection, _LENGTH.size))
            if length == _END:
                return None
            return Launch.from_bytes(_receive(self._connection, length))
        except OSError as error:
            raise EngineDeadError("node 0 is lost") from error

    def close(self) -> None:
        """Leave; node 0 takes it for a loss."""
        self._connection.close()


def _recognize(connection: socket.socket, key: bytes) -> int | None:
    """Return the rank of the node at the other end; `None` if it does not know the key."""
    try:
        connection.settimeout(CONNECT_SECONDS)
        nonce = secrets.token_bytes(_NONCE)
        connection.sendall(nonce)
        (rank,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
        proof = _receive(connection, _NONCE)
        connection.settimeout(None)
        _prepare(connection)
    except OSError:
        return None
    known = hmac.compare_digest(proof, hmac.digest(key, nonce, "sha256"))
    return rank if known else None


def _prepare(connection: socket.socket) -> None:
    """Send small messages at once, and find out within half a minute that a machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, start = memoryview(data), 0
    while start < length:
        count = connection.recv_into(view[start:])
        if not count:
            raise ConnectionError("the connection was closed")
        start += count
    return bytes(data)


def _key_value_store() -> Any:
    from jax._src import distributed  # not public, and without a public counterpart

    return distributed.global_state.client
