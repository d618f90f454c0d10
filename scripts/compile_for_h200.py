#!/usr/bin/env python3
"""Compile a step for H200s on a machine without one, and list what XLA makes of it.

    pip install --no-deps --target PLUGIN jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    PYTHONPATH=.:PLUGIN scripts/compile_for_h200.py --layers 4 --tokens 64 --seqs 64 --out step.hlo

Nothing runs, and nothing is timed: of several algorithms XLA takes its first. But copies, fusions
and collectives are those of the real program: look here before a GPU is asked. A step of `--seqs`
sequences is a decode step, unless it has more `--tokens`. With `--drafts` it verifies so many
drafted tokens of each sequence, and drafts as many for the next step by suffix decoding; with
`--speculator FOLDER`, by that instead. With
`--rounds` it does all that so many times; the body of that loop is listed first.

Of our own kernels, with CUDA's `ptxas` on the path, `MOSAIC_GPU_DUMP_TO=FOLDER` with
`MOSAIC_GPU_DUMP_PTX=1 MOSAIC_GPU_DUMP_PTXAS=1` writes the PTX, their registers and spills.
"""

import argparse
import collections
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec

from arctic_jax.engine.drafting import Drafting, SpeculatorDrafting
from arctic_jax.engine.programs import COMPILER_OPTIONS
from arctic_jax.engine.step_program import Step, StepProgram
from arctic_jax.engine.suffix_matching import SuffixMatching
from arctic_jax.kv_cache import KVCacheSpec, ModelCacheSpec
from arctic_jax.models.layers import dtype_of, named_parameters
from arctic_jax.models.registry import model_class, speculator_class
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.scheduled_batch import Bucket
from arctic_jax.shift_parallel import shift, ulysses
from arctic_jax.weight_stacks import WeightStacks

BLOCK_SIZE = 64
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
UNINTERESTING = {"parameter", "bitcast", "get-tuple-element", "constant", "tuple"}


def h200s(count: int) -> Sequence[Any]:
    """Return devices that programs can be compiled for, and no more."""
    jax.devices()  # this registers the plug-in
    topology = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=H200
    )
    return topology.devices


def step_program(args: argparse.Namespace, mesh: Mesh) -> StepProgram:
    """Return what an engine with the model's weights in bfloat16 would have."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    if args.layers:
        config["num_hidden_layers"] = args.layers
    cls = model_class(config)
    model_config = cls.config_from_hf(config)
    model = nnx.eval_shape(lambda: cls(model_config, mesh.size))
    stacks, dtype, layouts = stacks_of(model, mesh), jnp.dtype("bfloat16"), layouts_of(mesh)
    heads = PartitionSpec(None, None, next(reversed(layouts.values())).devices or None)
    cache = ModelCacheSpec(
        model_config.num_cache_layers, model.num_kv_groups, model_config.head_dim, heads
    )
    drafting: Drafting | None = SuffixMatching(args.drafts, args.seqs) if args.drafts else None
    if args.drafts and args.speculator:
        given = json.loads((args.speculator / "config.json").read_text())
        kind = speculator_class(given)
        drafting = SpeculatorDrafting(args.drafts, args.seqs, kind, kind.config_from_hf(given))
        stacks = stacks.followed_by(stacks_of(drafting.module(mesh.size, None), mesh))
    caches = (cache, *(drafting.caches() if drafting else ()))
    return StepProgram(
        cls,
        model_config,
        mesh.size,
        None,
        stacks,
        KVCacheSpec(caches, BLOCK_SIZE, dtype),
        max_blocks_per_seq=-(-args.max_model_len // BLOCK_SIZE),
        max_num_seqs=args.seqs,
        max_masks=args.seqs,
        max_rows=args.seqs * (1 + args.drafts) * args.rounds,
        max_logprobs=20,
        max_draft_len=args.drafts,
        max_rounds=args.rounds,
        drafting=drafting,
        has_inboxes=mesh.size > 1,
    )


def stacks_of(module: Any, mesh: Mesh) -> WeightStacks:
    """Return how a module's parameters lie on the devices."""
    parameters = named_parameters(module).values()
    partitions = {
        layout: [layout.partition(p.get_metadata("axis")) for p in parameters]
        for layout in layouts_of(mesh).values()
    }
    dtypes = [dtype_of(parameter, jnp.dtype("bfloat16")) for parameter in parameters]
    shapes = [parameter.shape for parameter in parameters]
    return WeightStacks.plan(shapes, partitions, dtypes, mesh, together=True)


def layouts_of(mesh: Mesh) -> dict[str, Any]:
    """Return an engine's layouts by their names, the one for few tokens first."""
    tp, sp = mesh.shape["tp"], mesh.shape["sp"]
    both = [shift(tp, sp), ulysses(tp, sp)]
    return {layout.name: layout for layout in both[: 2 if sp > 1 else 1]}


def print_operations(text: str) -> None:
    """Say how many there are of each kind of operation that a step launches."""
    body = re.search(r"= .*? while\(.*body=(%[\w.\-]+)", text)
    if body is not None:
        begin = text.index(f"\n{body[1]} ")
        print_operations_of(text[begin : text.index("\n}", begin)])
        print("and around it")
    print_operations_of(text[text.index("ENTRY") :])


def print_operations_of(computation: str) -> None:
    """Count those of one computation."""
    count: collections.Counter[str] = collections.Counter()
    for line in computation.splitlines():
        found = re.search(r"= .*? ([a-z\-]+)\(", line)
        if found is None or found[1] in UNINTERESTING:
            continue
        detail = re.search(r'custom_call_target="([^"]+)"|calls=%?([A-Za-z_\-]+)', line)
        name = (detail[1] or detail[2].rstrip("_-")) if detail else ""
        count[f"{found[1]} {name}"] += 1
    for name, number in count.most_common():
        print(f"{number:6}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="benchmarks/configs/llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--ulysses-sequence-parallel-size", type=int, default=1)
    parser.add_argument("--layout", default="shift", choices=("shift", "ulysses"))
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--seqs", type=int, default=1)
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--speculator", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=8448)
    parser.add_argument("--num-blocks", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="for the optimized HLO")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    tp, sp = args.tensor_parallel_size, args.ulysses_sequence_parallel_size
    devices = h200s(tp * sp)
    mesh = Mesh(np.array(devices).reshape(tp, sp), ("tp", "sp"))
    program = step_program(args, mesh)
    if args.drafts:
        rows = args.seqs * (1 + args.drafts)
        bucket = Bucket(rows, rows, args.seqs, 1 + args.drafts, num_rounds=args.rounds)
    else:
        longest = 1 if args.tokens == args.seqs else args.tokens
        bucket = Bucket(args.tokens, args.seqs, args.seqs, longest, num_rounds=args.rounds)
    start = time.perf_counter()
    with dispatch.lowering_for_hopper():
        lowered = program.lower(Step(layouts_of(mesh)[args.layout], bucket, args.num_blocks), mesh)
    compiled = lowered.compile(COMPILER_OPTIONS["gpu"])
    text = compiled.as_text() or ""
    print(f"{time.perf_counter() - start:.1f} s")
    print_operations(text)
    print(compiled.memory_analysis())
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
