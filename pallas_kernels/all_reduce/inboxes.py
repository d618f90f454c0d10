"""Memory on each device that the others write into, and the addresses they need for it."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax.pallas_kernels import dispatch

BLOCKS = 512
"""Most thread blocks of a call."""
PART_BYTES = 2048
"""That a thread block sends to a device in a round."""
COUNTERS_BYTES = 4 * BLOCKS  # one of the calls that each thread block has seen
SLOT_BYTES = 2 * BLOCKS * PART_BYTES  # what one device sends to another: words and their flags


def inbox_bytes(num_devices: int) -> int:
    """Bytes of one inbox: counters, and slots for each sender in each of two rounds, twice.

    Calls use them in turns. Two are enough: a device that sends the second call after this one has
    all parts of the call between, so its peers have begun that one, and have read this one to its
    end.
    """
    return COUNTERS_BYTES + 2 * 2 * num_devices * SLOT_BYTES


def addresses_shape(num_devices: int) -> tuple[int, int]:
    """Return the shape of `Inboxes.addresses`."""
    return num_devices, 2 * (num_devices + 1)


def num_devices(addresses: jax.Array) -> int:
    """Return how many devices a row of `Inboxes.addresses` is for."""
    return addresses.size // 2 - 1


class Inboxes:
    """An inbox on each device of a mesh; they live as long as this object.

    Attributes:
        addresses: `addresses_shape` int32, a row on each device: where this device's parts go in
            the inbox of each device, and its own inbox; the low word of each address first.
    """

    def __init__(self, mesh: Mesh) -> None:
        devices = mesh.devices.size
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._inboxes = jnp.zeros(
            (devices, inbox_bytes(devices) // 4), jnp.int32, device=sharding
        ).block_until_ready()
        by_device = {s.device: s.data for s in self._inboxes.addressable_shards}
        bases = np.array(
            [by_device[d].unsafe_buffer_pointer() for d in mesh.devices.flat], np.uint64
        )
        slots = COUNTERS_BYTES + SLOT_BYTES * np.arange(devices, dtype=np.uint64)
        addresses = np.concatenate([bases[None] + slots[:, None], bases[:, None]], axis=1)
        self.addresses = jax.device_put(addresses.view(np.int32), sharding)

    @staticmethod
    def unavailable(mesh: Mesh) -> str | None:
        """Return why the kernel cannot sum over the devices of a mesh, or `None` if it can."""
        devices = mesh.devices.flatten().tolist()
        if len(devices) == 1:
            return "there is one device"
        if any(device.process_index != jax.process_index() for device in devices):
            return "not all devices are this process's"
        if devices[0].platform != "gpu":
            return f"they are {devices[0].platform}s"
        if reason := dispatch.mosaic_gpu_unavailable():
            return reason
        if not all(_can_access(a, b) for a, b in itertools.permutations(devices, 2)):
            return "not every GPU can reach the memory of every other"
        return None


def _can_access(device: Any, peer: Any) -> bool:
    """Ask CUDA's driver, as XLA does, which then allows it for all pairs of its devices."""
    answer = ctypes.c_int(0)
    ids = device.local_hardware_id, peer.local_hardware_id
    failed = ctypes.CDLL("libcuda.so.1").cuDeviceCanAccessPeer(ctypes.byref(answer), *ids)
    return not failed and bool(answer.value)
