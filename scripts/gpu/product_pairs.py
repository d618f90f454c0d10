"""Two products of one token in one launch, against a launch for each. An experiment.

    python scripts/gpu/product_pairs.py --out FILE        # a minute
    python scripts/gpu/product_pairs.py --lower           # no GPU: does it lower?

With one token a layer only streams weights through, and between two kernels the memory rests: the
last blocks of one drain, the sum of the split products runs, the first weights of the next are on
their way. Here a row-parallel product (output projection, down) and the norm and product that
follow it (gate and up, the next layer's queries, keys and values) are one kernel of as many thread
blocks as fit on the chip at once. Each has its first weights of the second product on their way
before it waits for all others, twice: for the parts of the sums, and for the sums.

What it is to gain, on an H200 with Llama-3.1-8B: 8 us of the 115 of a layer without attention. The
interpreter knows no such barriers, so on a GPU the results are compared with those of two launches.
"""

import argparse
import datetime
import functools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.linear import linear
from arctic_jax.pallas_kernels.norm_linear import norm_linear
from arctic_jax.pallas_kernels.norm_linear.mosaic_gpu import (
    STEP,
    StreamedWeight,
    normalized,
    rows_layout,
    rows_of_step,
)
from benchmarks import kernels
from scripts.gpu.layer_products import EPSILON, LAYERS, WEIGHTS, arguments

BLOCKS = 256  # two of 128 threads on a multiprocessor; the counter wraps around at a multiple
THREADS = 128


def pair(
    activated: Array,
    row_weight: Array,
    x: Array,
    norm_weight: Array,
    weight: Array,
    counter: Array,
    *,
    columns: int,
    gated: bool,
) -> tuple[Array, Array, Array]:
    """Return `x + activated @ row_weight`, its norm times `weight`, and the counter.

    Args:
        activated: `[1, K]`.
        row_weight: `[K, H]`.
        x: `[1, H]`, the residual stream.
        norm_weight: `[H]`.
        weight: `[..., H]`, or `[shards, 2, F, H]` if gated.
        counter: `[1]`, of the blocks that have come to a barrier: a multiple of `BLOCKS`.
        columns: of a tile of `row_weight`.
        gated: whether `weight` is a SwiGLU pair.
    """
    (K, H), matrices = row_weight.shape, weight if gated else weight.reshape(1, 1, -1, x.shape[1])
    shards, parts, F, _ = matrices.shape
    chunks = BLOCKS * columns // H  # of rows
    assert K % chunks == 0, (K, chunks)
    fitting = [r for r in range(1, STEP // columns + 1) if K // chunks % r == 0]
    ref = jax.new_ref(counter)
    total, out, *_ = plgpu.kernel(
        functools.partial(
            _body, columns=columns, row_step=fitting[-1], rows=rows_of_step(H, F, parts)
        ),
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((1, shards * F), x.dtype),
            jax.ShapeDtypeStruct((chunks, H), jnp.float32),
            jax.ShapeDtypeStruct((H,), x.dtype),
        ],
        grid=(BLOCKS,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="product_pair",
    )(activated, row_weight, x, norm_weight, matrices, ref)
    return total, out, jax.freeze(ref)


def _body(
    activated_gmem,  # [1, K]
    row_weight_gmem,  # [K, H]
    x_gmem,  # [1, H]
    norm_weight_gmem,  # [H]
    weight_gmem,  # [shards, 1 or 2, F, H]
    counter_gmem,  # [1]
    sum_gmem,  # [1, H]
    out_gmem,  # [1, shards * F]
    parts_gmem,  # [chunks, H]
    delta_gmem,  # [H]
    *,
    columns: int,
    row_step: int,
    rows: int,
):
    H, dtype, block = x_gmem.shape[1], x_gmem.dtype, lax.axis_index("block")
    load = functools.partial(plgpu.load, optimized=False)

    _row_product(block, activated_gmem, row_weight_gmem, parts_gmem, columns, row_step, load)

    weight = StreamedWeight(weight_gmem, rows, block, BLOCKS)
    by_element = weight.layout.reduce(0)
    begin = weight.fetch(block)
    x = load(x_gmem.at[0], layout=by_element).astype(jnp.float32)
    norm_weight = load(norm_weight_gmem, layout=by_element).astype(jnp.float32)
    _wait_for_all_blocks(counter_gmem)

    @pl.when(block < H // THREADS)
    def _():
        layout = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
        mine = pl.ds(block * THREADS, THREADS)
        sums = [load(parts_gmem.at[i, mine], layout=layout) for i in range(parts_gmem.shape[0])]
        delta_gmem[mine] = functools.reduce(jnp.add, sums).astype(dtype)

    _wait_for_all_blocks(counter_gmem)
    x = (x + load(delta_gmem, layout=by_element).astype(jnp.float32)).astype(dtype)

    @pl.when(block == 0)
    def _():
        sum_gmem[0] = x

    weight.multiply(begin, normalized(x, norm_weight, EPSILON), out_gmem)


def _row_product(block, activated_gmem, weight_gmem, parts_gmem, columns, row_step, load) -> None:
    """Multiply a chunk of rows by their inputs, for some columns; the next step's on their way."""
    K, H = weight_gmem.shape
    layout = rows_layout(columns)
    by_column, by_row = layout.reduce(0), layout.reduce(1)
    chunk, place = lax.div(block, H // columns), lax.rem(block, H // columns)
    chunk_rows = K // parts_gmem.shape[0]
    steps, mine = chunk_rows // row_step, pl.ds(place * columns, columns)

    def fetch(step):
        first = chunk * chunk_rows + jnp.minimum(step, steps - 1) * row_step
        some = pl.ds(first, row_step)
        return (
            load(weight_gmem.at[some, mine], layout=layout),
            load(activated_gmem.at[0, some], layout=by_row),
        )

    def add(step, carry):
        acc, (weight, activated) = carry
        following = fetch(step + 1)
        scale = lax.broadcast_in_dim(activated.astype(jnp.float32), (row_step, columns), [0])
        scale = plgpu.layout_cast(scale, layout)
        acc += jnp.sum(weight.astype(jnp.float32) * scale, axis=0)
        _keep_loads_early()
        return acc, following

    zero = plgpu.layout_cast(jnp.zeros(columns, jnp.float32), by_column)
    acc, _ = lax.fori_loop(0, steps, add, (zero, fetch(0)))
    parts_gmem[chunk, mine] = acc


def _keep_loads_early() -> None:
    """Have LLVM leave what was loaded for the next round where it is, not load it there."""

    @plgpu.inline_mgpu()
    def nothing(_) -> None:
        utils.inline_ptx("", has_side_effects=True)

    nothing()


def _wait_for_all_blocks(counter_gmem) -> None:
    """Wait until every block has come here, and see what they have written.

    All blocks must be on the chip at once. The counter goes on from call to call, so whoever comes
    waits for the next multiple of `BLOCKS`; comparing differences, it may wrap around.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_, counter: ir.Value) -> None:
        address = utils.memref_ptr(counter)
        utils.warpgroup_barrier()
        utils.inline_ptx(
            f"""{{
            .reg .pred others, early;
            .reg .u32 thread, old, now, target;
            .reg .s32 missing;
            mov.u32 thread, %tid.x;
            setp.ne.u32 others, thread, 0;
            @others bra done;
            fence.acq_rel.gpu;
            atom.global.add.acq_rel.gpu.u32 old, [$0], 1;
            or.b32 target, old, {BLOCKS - 1};
            add.u32 target, target, 1;
            again:
            ld.global.acquire.gpu.u32 now, [$0];
            sub.u32 missing, target, now;
            setp.gt.s32 early, missing, 0;
            @early bra again;
            fence.acq_rel.gpu;
            done:
            }}""",
            address,
        )
        utils.warpgroup_barrier()

    wait(counter_gmem)


def layers(columns: int | None, weights: list[dict[str, Array]], x: Array, counter: Array):
    """Run `LAYERS` layers without attention; with `columns`, two products in a launch."""

    def following(x, activated, name, gated, own, next_, counter):
        delta_weight = own["output" if gated else "down"]
        if columns is None:
            delta = linear(activated, delta_weight, inputs_first=True)
            x, out = norm_linear(x, delta, next_["norm"], next_[name], epsilon=EPSILON, gated=gated)
            return x, out, counter
        fused = functools.partial(pair, columns=columns, gated=gated)
        return fused(activated, delta_weight, x, next_["norm"], next_[name], counter)

    _, qkv = norm_linear(
        x, jnp.zeros_like(x), weights[0]["norm"], weights[0]["qkv"], epsilon=EPSILON
    )
    for i in range(LAYERS):
        own, next_ = weights[i % len(weights)], weights[(i + 1) % len(weights)]
        attended = lax.optimization_barrier(qkv[:, : own["output"].shape[0]])
        x, activated, counter = following(x, attended, "gate_up", True, own, own, counter)
        x, qkv, counter = following(x, activated, "qkv", False, own, next_, counter)
    return x, qkv, counter


def measure(rounds: int, widths: list[int]) -> list[dict]:
    """Return microseconds of a layer, of all ways in turns, and how far results are apart."""
    weights, x, _ = jax.jit(functools.partial(arguments, "llama_8b", 1))()
    programs = {
        width: jax.jit(functools.partial(layers, width), donate_argnums=2)
        for width in [None, *widths]
    }
    expected, times = None, {width: [] for width in programs}
    rows = []
    for width, program in programs.items():
        *found, _ = program(weights, x, jnp.zeros(1, jnp.int32))
        found = [array.astype(jnp.float32) for array in found]
        expected = expected or found
        apart = max(
            float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
            for a, b in zip(found, expected, strict=True)
        )
        rows.append({"columns": width, "difference": apart})
    for _ in range(rounds):
        for width, program in programs.items():
            launch = lambda state, program=program: program(weights, *state)[::2]
            state = (x, jnp.zeros(1, jnp.int32))
            seconds, _ = kernels.seconds_per_launch(launch, state)
            times[width].append(seconds / LAYERS * 1e6)
    return [row | {"us": sorted(times[row["columns"]])} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=5, help="in which each is measured once")
    parser.add_argument("--lower", action="store_true", help="lower all, time nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.lower:
        weights, x, _ = jax.eval_shape(functools.partial(arguments, "llama_8b", 1))
        counter = jax.ShapeDtypeStruct((1,), jnp.int32)
        with dispatch.lowering_for_hopper():
            for width in options.columns:
                program = jax.jit(functools.partial(layers, width))
                program.trace(weights[:1], x, counter).lower(lowering_platforms=("cuda",))
        return
    found = measure(options.rounds, options.columns)
    for row in found:
        name = "two launches" if row["columns"] is None else f"one, {row['columns']} columns"
        print(f"{name:18s} {statistics.median(row['us']):7.1f} us, apart {row['difference']:.1e}")
    if options.out:
        document = {
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__},
            "command": "python scripts/gpu/product_pairs.py " + " ".join(sys.argv[1:]),
            "unit": f"us of a layer without attention, of {LAYERS} with {WEIGHTS} layers' weights",
            "results": found,
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
