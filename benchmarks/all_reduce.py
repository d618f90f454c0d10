"""Sums over the GPUs of one host: our kernel in one round and in two beside NCCL's, by size.

    python benchmarks/all_reduce.py --out FILE

Each call depends on the one before, `CALLS` of them in one program, and many programs are in
flight: so a time is that of the device, or of the host where that one cannot keep up.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from arctic_jax import __version__
from arctic_jax.pallas_kernels.all_reduce import Inboxes, mosaic_gpu, reference
from arctic_jax.pallas_kernels.all_reduce.inboxes import BLOCKS

CALLS = 64
AXIS = "devices"
EVERYWHERE = PartitionSpec(AXIS)


def main() -> None:
    """Measure what the command line asks for, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    if reason := Inboxes.unavailable(mesh):
        raise SystemExit(f"nothing to measure: {reason}")
    inboxes = Inboxes(mesh)
    rows = []
    for tokens in args.tokens:
        row: dict[str, Any] = {"tokens": tokens, "bytes": 2 * tokens * args.hidden}
        for name, rounds in {"one_round_us": 1, "two_rounds_us": 2, "nccl_us": 0}.items():
            if not rounds or mosaic_gpu.num_blocks(row["bytes"], mesh.size, rounds) <= BLOCKS:
                row[name] = microseconds(rounds, mesh, inboxes, tokens, args.hidden)
        rows.append(row)
        print("  ".join(f"{name} {value:9.1f}" for name, value in row.items()), flush=True)
    document = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"arctic_jax": __version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")


def microseconds(rounds: int, mesh: Mesh, inboxes: Inboxes, tokens: int, hidden: int) -> float:
    """Return the time of one sum in so many rounds; 0 for NCCL's."""

    def calls(x: Array, addresses: Array) -> Array:
        x = x[0]
        for _ in range(CALLS):
            if rounds:
                x = mosaic_gpu.all_reduce(x, addresses, rounds)
            else:
                x = reference.all_reduce(x, (AXIS,))
            x = x * (1 / mesh.size)  # so that it does not grow
        return x[None]

    step = jax.jit(
        jax.shard_map(
            calls,
            mesh=mesh,
            in_specs=(EVERYWHERE, EVERYWHERE),
            out_specs=EVERYWHERE,
            check_vma=False,
        ),
        donate_argnums=0,
    )
    shape = (mesh.size, tokens, hidden)
    sharding = jax.sharding.NamedSharding(mesh, EVERYWHERE)
    x = jax.device_put(np.full(shape, 0.5, jnp.bfloat16), sharding)
    for _ in range(3):
        x = step(x, inboxes.addresses)
    jax.block_until_ready(x)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(10):
            x = step(x, inboxes.addresses)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - start) / 10 / CALLS * 1e6)
    return best


if __name__ == "__main__":
    main()
