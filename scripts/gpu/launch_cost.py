"""What a launch costs the host: by XLA's options, by kinds of kernels, and by what XLA does in it.

    python scripts/gpu/launch_cost.py --model benchmarks/configs/smollm2-135m --out FILE

A decode step of one sequence, compiled from one lowering with different options, in turns; then
chains of one kind of kernel each; then the time line of the host's threads during a few steps.
`launch` is the time of the call that starts a program on an idle device, `step` that of one of many
that are started one after the other. Of a chain, `step` is with results that are kept, so that each
lies elsewhere and XLA changes the graph, `in place` with results that are dropped, whose memory the
next takes, and `kernel` and `pause` are the device's, by a profile. The last chain is gone through
several times a launch.
"""

import argparse
import collections
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton

from arctic_jax import LLM, SamplingParams
from arctic_jax.engine.programs import COMPILER_OPTIONS
from arctic_jax.engine.step_program import Step
from arctic_jax.pallas_kernels.norm_linear import norm_linear
from arctic_jax.scheduled_batch import ScheduledBatch, ScheduledRequest
from arctic_jax.serving.environment import record

OPTIONS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "SERIALIZE": {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"},
    "CONCURRENT": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
    "SKIP_TEMP": {"xla_gpu_command_buffer_update_mode": "SKIP_TEMP"},
    "SKIP_PROFILED": {"xla_gpu_command_buffer_update_mode": "SKIP_PROFILED"},
    "no dependent launches": {"xla_gpu_enable_pdl_launch": False, "xla_gpu_enable_pdl": False},
    "no graphs": {"xla_gpu_enable_command_buffer": ""},
}
LINKS = 200
ROUNDS = 4


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="benchmarks/configs/smollm2-135m")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    llm = LLM(
        args.model,
        load_format="dummy",
        max_model_len=args.max_model_len,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        num_blocks=64,
    )
    runner = llm.engine.runner
    scheduled = decode_step(llm)
    layout, bucket = runner.picker.pick(scheduled)
    cache = runner.programs
    step = Step(layout, bucket, runner.num_blocks)
    lowered = cache._program.lower(step, runner.mesh)
    base = COMPILER_OPTIONS.get(jax.default_backend(), {})

    def compiled(item: tuple[str, dict[str, Any]]) -> tuple[str, Any]:
        try:
            return item[0], lowered.compile(base | item[1])
        except Exception as error:  # an option that this version does not know
            print(f"{item[0]}: {error!s:.200}")
            return item[0], None

    options = OPTIONS if on_gpu else {"as they are": {}}
    with ThreadPoolExecutor(8) as threads:
        programs = {name: p for name, p in threads.map(compiled, options.items()) if p is not None}
    times: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for _ in range(args.rounds):
        for name, program in programs.items():
            cache._compiled[layout, bucket] = program
            for _ in range(3):  # the first make its graph
                jax.block_until_ready(runner.launch(scheduled).output)
            times[name].append(timed(lambda: runner.launch(scheduled).output))
    rows = []
    for name, found in times.items():
        launch, pace = (statistics.median(t) * 1e3 for t in zip(*found, strict=True))
        rows.append({"what": name, "launch_ms": launch, "step_ms": pace})
        print(f"{name:24} launch {launch:.3f} ms, step {pace:.3f} ms", flush=True)
    cache._compiled[layout, bucket] = programs["as they are"]
    for name, (chain, kernels) in chains(on_gpu).items():
        chain()
        launch, pace = (t / kernels * 1e6 for t in timed(chain))
        in_place = timed_in_place(chain) / kernels * 1e6
        kernel, pause = on_device(chain) if on_gpu else (0.0, 0.0)
        figures = {"launch": launch, "step": pace, "in_place": in_place}
        figures |= {"kernel": kernel, "pause": pause}
        rows.append({"what": name} | {f"{key}_us_a_kernel": us for key, us in figures.items()})
        print(name.ljust(24), ", ".join(f"{key} {us:.2f} us" for key, us in figures.items()))
    events = host_events(lambda: runner.launch(scheduled).output)
    for name, (count, milliseconds) in list(events.items())[:40]:
        print(f"{milliseconds:9.3f} ms {count:6.1f} a step  {name:.100}")
    longest = {name: ms for name, (_, ms) in list(events.items())[:60]}
    document = record() | {"rows": rows, "host_events_ms_a_step": longest}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")


def decode_step(llm: LLM) -> ScheduledBatch:
    """Return a step that can be launched again and again: its request's last token."""
    prompt = np.random.default_rng(0).integers(0, 256, 300).tolist()
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    llm.engine.add_request("it", prompt, params)
    for _ in range(10):
        llm.engine.step()
    (request,) = llm.engine.scheduler.running
    part = ScheduledRequest(request, request.num_computed_tokens - 1, 1, 1, True)
    return ScheduledBatch((part,))


def timed(launch: Callable[[], Any], repeats: int = 30) -> tuple[float, float]:
    """Return the seconds of a launch on an idle device, and of one among many."""
    alone = []
    for _ in range(repeats // 2):
        start = time.perf_counter()
        output = launch()
        alone.append(time.perf_counter() - start)
        jax.block_until_ready(output)
    start = time.perf_counter()
    jax.block_until_ready([launch() for _ in range(repeats)])
    return statistics.median(alone), (time.perf_counter() - start) / repeats


def timed_in_place(launch: Callable[[], Any], repeats: int = 30) -> float:
    """Return the seconds of one of many launches, each of which may take the last one's memory."""
    output = jax.block_until_ready(launch())
    start = time.perf_counter()
    for _ in range(repeats):
        output = launch()
    jax.block_until_ready(output)
    return (time.perf_counter() - start) / repeats


def chains(on_gpu: bool) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return programs of so many kernels of one kind, each of which needs the one before."""
    x = jnp.ones((1, 512), jnp.bfloat16)
    weight, norm = jnp.ones((512, 512), jnp.bfloat16), jnp.ones(512, jnp.bfloat16)
    stack = jnp.ones((LINKS, 512, 512), jnp.bfloat16)
    links: dict[str, Callable[[Any, int], Any]] = {
        "XLA's reductions": lambda x, i: (x * x.sum()).astype(x.dtype),
        "XLA's products, of two kernels": lambda x, i: x @ weight,
    }
    if on_gpu:
        links["next to nothing, Mosaic"] = lambda x, i: add_one_by_mosaic(x)
        links["next to nothing, Triton"] = lambda x, i: add_one_by_triton(x)
        ours = functools.partial(norm_linear, epsilon=1e-5, implementation="mosaic_gpu")
        links["ours"] = lambda x, i: ours(x, x, norm, weight)[1]
        links["ours with slices"] = lambda x, i: ours(x, x, norm, stack[i])[1]

    def chain(link: Callable[[Any, int], Any], x: Any) -> Any:
        for i in range(LINKS):
            x = jax.lax.optimization_barrier(link(x, i))
        return x

    def loop(link: Callable[[Any, int], Any], x: Any) -> Any:
        return jax.lax.fori_loop(0, ROUNDS, lambda _, x: chain(link, x), x)

    rows = {"XLA's products, of two kernels": jnp.ones((16, 512), jnp.bfloat16)}
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, link in links.items():
        program = jax.jit(functools.partial(chain, link))
        found[name] = functools.partial(program, rows.get(name, x)), LINKS
    name, link = list(links.items())[-1]
    program = jax.jit(functools.partial(loop, link))
    again = functools.partial(program, rows.get(name, x))
    return found | {f"{name}, {ROUNDS} times": (again, LINKS * ROUNDS)}


def add_one_by_mosaic(x: Any) -> Any:
    """A custom call, which XLA captures as a graph within the graph."""

    def body(x_gmem: Any, out_gmem: Any) -> None:
        out_gmem[0] = x_gmem[0] + 1

    return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def add_one_by_triton(x: Any) -> Any:
    """A kernel that XLA launches itself."""

    def body(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...] + 1

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(body, out_shape=out, compiler_params=triton.CompilerParams())(x)


def profiled(launch: Callable[[], Any], steps: int, host_tracer_level: int) -> list[Any]:
    """Return the planes of a profile of some steps, each waited for."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, host_tracer_level
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                jax.block_until_ready(launch())
        path = next(Path(folder).rglob("*.xplane.pb"))
        return list(jax.profiler.ProfileData.from_file(str(path)).planes)


def on_device(launch: Callable[[], Any]) -> tuple[float, float]:
    """Return the median microseconds of a kernel, and of the time until the next one begins."""
    kernels = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in profiled(launch, 4, 0)
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    )
    pauses = [begin - end for (_, end), (begin, _) in itertools.pairwise(kernels)]
    length = statistics.median(end - begin for begin, end in kernels)
    return length / 1e3, statistics.median(pauses) / 1e3


def host_events(launch: Callable[[], Any], steps: int = 10) -> dict[str, tuple[float, float]]:
    """Return what the host's threads did, longest first: how often and for how long a step."""
    count: collections.Counter[str] = collections.Counter()
    spent: collections.Counter[str] = collections.Counter()
    for plane in profiled(launch, steps, 3):
        for line in plane.lines if plane.name.startswith("/host") else ():
            for event in line.events:
                count[event.name] += 1
                spent[event.name] += event.duration_ns
    return {name: (count[name] / steps, ns / steps / 1e6) for name, ns in spent.most_common()}


if __name__ == "__main__":
    main()
