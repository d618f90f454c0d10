"""The sum over the GPUs of one host on Hopper: everybody writes to everybody, in one launch.

Each thread writes its part into the inbox of every device, over NVLink, word by word with a flag
beside it (the number of the call), in stores of 8 bytes that arrive whole. So nobody waits for a
fence or for a message that says that data is there: a thread reads its own inbox until all flags
are this call's. This is the idea of NCCL's low-latency protocol, for sums that fit one launch. The
host takes no part, and the kernel stays within a step's CUDA graph.

What peers' memory is, Pallas does not know: these loads and stores are PTX.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, vector

from arctic_jax.pallas_kernels.all_reduce import inboxes as memory

THREADS = 128
SEND_BYTES = 16  # two words and their flags, of one thread in one store
ONE_ROUND_BYTES = 128 * 1024
"""Up to so many it is faster to send everything to everybody than to wait a second time."""


def unsupported(x: jax.ShapeDtypeStruct, num_devices: int) -> str | None:
    """Return why this kernel does not take an array, or `None` if it does."""
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{x.dtype} is not a 16- or 32-bit float"
    size = math.prod(x.shape) * x.dtype.itemsize
    if size % (8 * THREADS):
        return f"{size} bytes are no multiple of {8 * THREADS}"
    if num_blocks(size, num_devices, best_rounds(x, num_devices)) > memory.BLOCKS:
        return f"{size} bytes are too many for {memory.BLOCKS} thread blocks"
    return None


def num_blocks(size: int, num_devices: int, rounds: int) -> int:
    """Return how many thread blocks sum `size` bytes; an inbox has room for `BLOCKS`."""
    return size // _block_bytes(size, num_devices, rounds)


def best_rounds(x: jax.ShapeDtypeStruct, num_devices: int) -> int:
    """Return how often the devices should send to each other, see `all_reduce`."""
    size = math.prod(x.shape) * x.dtype.itemsize
    can_be_split = size % (8 * THREADS * num_devices) == 0
    return 2 if size > ONE_ROUND_BYTES and can_be_split else 1


def _block_bytes(size: int, num_devices: int, rounds: int) -> int:
    """Return what a thread block sums: 16 bytes a thread, or 8, for each part that it has."""
    parts = num_devices if rounds == 2 else 1
    return THREADS * parts * (16 if size % (16 * THREADS * parts) == 0 else 8)


# Traced once for all the layers of a model that call it with the same shapes.
@functools.partial(jax.jit, static_argnames="rounds")
def all_reduce(x: Array, addresses: Array, rounds: int) -> Array:
    """See `op.all_reduce`.

    In one round each device sends all it has to all, and everybody adds up everything. In two each
    adds up one part, which it then sends to all: a second time to wait, but a fraction to send.
    """
    num_devices = memory.num_devices(addresses)
    assert num_blocks(x.nbytes, num_devices, rounds) <= memory.BLOCKS, "see `unsupported`"
    block_size = _block_bytes(x.nbytes, num_devices, rounds) // x.dtype.itemsize
    parts = num_devices if rounds == 2 else 1
    flat = plgpu.kernel(
        functools.partial(_body, parts=parts, part_size=block_size // parts),
        out_type=jax.ShapeDtypeStruct((x.size,), x.dtype),
        grid=(x.size // block_size,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane  # takes the layout as it is given
        ),
        kernel_name="all_reduce",
    )(x.reshape(-1), addresses.reshape(-1))
    return flat.reshape(x.shape)


def _body(
    x_gmem,  # [size]
    addresses_gmem,  # [2 (P + 1)], see `Inboxes`
    sum_gmem,  # [size]
    *,
    parts: int,
    part_size: int,
):
    first = lax.axis_index("block") * parts
    places = [pl.ds((first + i) * part_size, part_size) for i in range(parts)]
    layout = plgpu.Layout.WG_STRIDED((part_size,), vec_size=part_size // THREADS)
    like = plgpu.ShapeDtypeStruct((part_size,), x_gmem.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[layout] * parts), return_type=(like,) * parts)
    def exchange(_, addresses: ir.Value, *arrays: Any) -> tuple[Any, ...]:
        vectors = [array.registers.item() for array in arrays]  # one a thread
        totals = _exchange(vectors, _Inbox(addresses))
        return tuple(
            mgpu.FragmentedArray(
                _registers=np.full(array.registers.shape, total, object),
                _layout=array.layout,
                _is_signed=array.is_signed,
            )
            for array, total in zip(arrays, totals, strict=True)
        )

    load = functools.partial(plgpu.load, layout=layout, optimized=False)
    totals = exchange(addresses_gmem, *[load(x_gmem.at[place]) for place in places])
    for place, total in zip(places, totals, strict=True):
        sum_gmem[place] = total


def _exchange(vectors: Sequence[ir.Value], inbox: "_Inbox") -> Sequence[ir.Value]:
    """Send this thread's vectors; return their sums over the devices."""
    everybody = len(inbox.targets)
    if len(vectors) == 1:
        received = inbox.exchange(0, [*vectors] * everybody)
        totals = [_sum(received)]
    else:
        received = inbox.exchange(0, vectors)
        totals = inbox.exchange(1, [_sum(received)] * everybody)
    inbox.close()
    return totals


class _Inbox:
    """What a thread needs to exchange vectors with the same thread of the other devices."""

    def __init__(self, addresses: ir.Value) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        integer = functools.partial(arith.constant, i64)
        block, thread = (
            arith.index_cast(i64, index(gpu.Dimension.x)) for index in (gpu.block_id, gpu.thread_id)
        )
        table = utils.memref_ptr(addresses)
        (words,) = ir.MemRefType(addresses.type).shape
        *self.targets, own = (
            utils.inline_ptx(f"ld.global.nc.u64 $0, [$1 + {8 * i}];", table, result_types=i64)
            for i in range(words // 2)
        )
        self.counter = arith.addi(own, arith.muli(block, integer(4)))
        calls = utils.inline_ptx(
            "ld.volatile.global.u32 $0, [$1];",
            self.counter,
            result_types=i32,
            has_side_effects=True,
        )
        self.call = arith.addi(calls, arith.constant(i32, 1))
        turn = arith.extui(i64, arith.andi(self.call, arith.constant(i32, 1)))
        self.round_bytes = len(self.targets) * memory.SLOT_BYTES
        within = arith.addi(
            arith.muli(block, integer(2 * memory.PART_BYTES)),
            arith.muli(thread, integer(SEND_BYTES)),
        )
        self.offset = arith.addi(arith.muli(turn, integer(2 * self.round_bytes)), within)
        self.slots = arith.addi(own, integer(memory.COUNTERS_BYTES))

    def exchange(self, number: int, vectors: Sequence[ir.Value]) -> list[ir.Value]:
        """In the round of that number, send a vector to each device; return those of all."""
        i64 = ir.IntegerType.get_signless(64)
        offset = arith.addi(self.offset, arith.constant(i64, number * self.round_bytes))
        for target, part in zip(self.targets, vectors, strict=True):
            _send(_words(part), self.call, arith.addi(target, offset))
        like = vectors[0].type
        count = utils.bitwidth(like) // 32
        from_ = arith.addi(self.slots, offset)
        received = _receive(count, self.call, from_, len(self.targets))
        return [_vector(words, like) for words in received]

    def close(self) -> None:
        """Count the call, once nobody wants the counter as it was."""
        utils.warpgroup_barrier()
        utils.inline_ptx("st.volatile.global.u32 [$0], $1;", self.counter, self.call)


def _words(part: ir.Value) -> list[ir.Value]:
    """Split a vector into 32-bit words."""
    i32 = ir.IntegerType.get_signless(32)
    count = utils.bitwidth(part.type) // 32
    words = vector.bitcast(ir.VectorType.get((count,), i32), part)
    return [vector.extract(words, dynamic_position=[], static_position=[i]) for i in range(count)]


def _vector(words: Sequence[ir.Value], like: ir.VectorType) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return vector.bitcast(like, vector.from_elements(ir.VectorType.get((len(words),), i32), words))


def _send(words: Sequence[ir.Value], flag: ir.Value, address: ir.Value) -> None:
    for i in range(0, len(words), 2):
        at = i // 2 * SEND_BYTES * THREADS
        store = f"st.volatile.global.v4.u32 [$0 + {at}], {{$1, $3, $2, $3}};"
        utils.inline_ptx(store, address, *words[i : i + 2], flag)


def _receive(
    num_words: int, flag: ir.Value, first: ir.Value, num_devices: int
) -> list[tuple[ir.Value, ...]]:
    """Wait for all devices' words of the call `flag`; return them, by device."""
    count = num_words * num_devices
    loads = [
        f"ld.volatile.global.v4.u32 {{${2 * i}, flag{2 * i}, ${2 * i + 1}, flag{2 * i + 1}}}, "
        f"[from + {_received_at(i, num_words)}];"
        for i in range(count // 2)
    ]
    checks = [f"setp.ne.or.u32 late, flag{i}, call, late;" for i in range(1, count)]
    received = utils.inline_ptx(
        f"""{{
        .reg .pred late;
        .reg .u32 call, flag<{count}>;
        .reg .u64 from;
        mov.u64 from, ${count};
        mov.u32 call, ${count + 1};
        again:
        {" ".join(loads)}
        setp.ne.u32 late, flag0, call;
        {" ".join(checks)}
        @late bra again;
        }}""",
        first,
        flag,
        result_types=[ir.IntegerType.get_signless(32)] * count,
        has_side_effects=True,
    )
    return [received[i : i + num_words] for i in range(0, count, num_words)]


def _received_at(pair: int, num_words: int) -> int:
    """Where a pair of words lies, in bytes after the first of the first device."""
    device, pair = divmod(pair, num_words // 2)
    return device * memory.SLOT_BYTES + pair * SEND_BYTES * THREADS


def _sum(parts: Sequence[ir.Value]) -> ir.Value:
    """Add vectors one after the other, in float32."""
    kind = parts[0].type
    f32 = ir.VectorType.get(kind.shape, ir.F32Type.get())
    if kind == f32:
        return functools.reduce(arith.addf, parts)
    return arith.truncf(kind, functools.reduce(arith.addf, (arith.extf(f32, p) for p in parts)))
