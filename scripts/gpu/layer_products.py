"""What each product of a layer adds to a decode step, by each implementation.

    python scripts/gpu/layer_products.py --tokens 1 16 64 --out FILE     # a minute
    python scripts/gpu/layer_products.py --lower                         # no GPU: does all lower?

A product timed alone says little about a step of some hundred kernels, where what comes before and
after it counts as well. So here are layers in a row without attention, as one program, with weights
that do not fit into the L2 cache: first as the dispatch would have it, then with one product at a
time done another way. A time is that of the device for one layer; two to three microseconds are
noise.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
from jax import Array

from arctic_jax.models.layers import sum_of_products
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.add_rms_norm import add_rms_norm
from arctic_jax.pallas_kernels.linear import cases, linear, mosaic_gpu
from arctic_jax.pallas_kernels.linear.mosaic_gpu import Config
from arctic_jax.pallas_kernels.norm_linear import norm_linear
from benchmarks import kernels

WEIGHTS = 8  # layers with weights of their own
LAYERS = 16  # in a program
PRODUCTS = ("qkv", "output", "gate_up", "down")
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Way:
    """How one product is done.

    Attributes:
        implementation: of `norm_linear` or `linear`, as their argument of that name; or "sum",
            XLA's sum of products in place of its matrix product, for one token.
        apart: the norm before the product is a kernel of its own.
        config: sizes of the kernel of `linear`.
    """

    implementation: str | None = None
    apart: bool = False
    config: Config | None = None

    def __str__(self) -> str:
        sizes = "" if self.config is None else str(tuple(vars(self.config).values()))
        return f"{'norm, ' if self.apart else ''}{self.implementation or 'default'}{sizes}"

    def product(
        self, x: Array, weight: Array, gated: bool = False, inputs_first: bool = False
    ) -> Array:
        """Return the product of `linear`."""
        if self.config is not None:
            return mosaic_gpu.linear(x, weight, None, gated, inputs_first, config=self.config)
        if self.implementation == "sum":
            return one_token(x, weight, gated, inputs_first)
        choice = self.implementation
        return linear(x, weight, gated=gated, inputs_first=inputs_first, implementation=choice)

    def after_norm(
        self, x: Array, delta: Array, norm: Array, weight: Array, gated: bool
    ) -> tuple[Array, Array]:
        """Return what `norm_linear` does."""
        if not self.apart:
            fused = functools.partial(norm_linear, implementation=self.implementation)
            return fused(x, delta, norm, weight, epsilon=EPSILON, gated=gated)
        x, normed = add_rms_norm(x, delta, norm, epsilon=EPSILON)
        return x, self.product(normed, weight, gated=gated)


def one_token(x: Array, weight: Array, gated: bool, inputs_first: bool) -> Array:
    """Return the product of one token with a weight, as XLA does it without cuBLAS."""

    def rows(weight: Array) -> Array:
        return sum_of_products(x, weight.reshape(-1, x.shape[1]))

    if inputs_first:
        out = jnp.sum(x.T.astype(jnp.float32) * weight.astype(jnp.float32), axis=0)[None]
    elif gated:
        out = jax.nn.silu(rows(weight[:, 0])) * rows(weight[:, 1])
    else:
        out = rows(weight)
    return out.astype(x.dtype)


def ways_for(model: str, product: str, tokens: int) -> list[Way]:
    """Return the ways to do a product that are not the dispatch's own."""
    names = ["mosaic_gpu", "xla", *(["sum"] if tokens == 1 else [])]
    found = [Way(name, apart=product in ("qkv", "gate_up")) for name in names]
    if product == "gate_up" and tokens <= 16:
        inputs = cases.LAYERS[model][product]["weight"][-1]
        configs = [Config(128, 128, 3), Config(64, 64, 6)]
        found += [Way("mosaic_gpu", True, c) for c in configs if inputs % c.depth == 0]
    return found


def layers(ways: dict[str, Way], weights: list[dict[str, Array]], x: Array, delta: Array):
    """Run `LAYERS` layers; return the residual stream, and what is to be added to it."""
    for i in range(LAYERS):
        own = weights[i % len(weights)]
        x, qkv = ways["qkv"].after_norm(x, delta, own["norm"], own["qkv"], False)
        attended = jax.lax.optimization_barrier(qkv[:, : own["output"].shape[0]])
        delta = ways["output"].product(attended, own["output"], inputs_first=True)
        x, activated = ways["gate_up"].after_norm(x, delta, own["norm"], own["gate_up"], True)
        delta = ways["down"].product(activated, own["down"], inputs_first=True)
    return x, delta


def layers_with(product: str | None, way: Way) -> Any:
    """Return the program with one product done that way, all others as the dispatch has them."""
    ways = {name: way if name == product else Way() for name in PRODUCTS}
    return jax.jit(functools.partial(layers, ways))


def arguments(model: str, tokens: int) -> tuple[list[dict[str, Array]], Array, Array]:
    """Return weights of several layers, and the residual stream."""
    sizes, keys = cases.LAYERS[model], iter(jax.random.split(jax.random.key(0), 6 * WEIGHTS))
    hidden = sizes["qkv"]["weight"][-1]

    def weight(product):
        shape, keywords = sizes[product]["weight"], sizes[product]
        inputs = shape[0] if keywords.get("inputs_first") else shape[-1]
        return jax.random.normal(next(keys), shape, jnp.bfloat16) * inputs**-0.5

    weights = [
        {p: weight(p) for p in PRODUCTS} | {"norm": jnp.ones(hidden, jnp.bfloat16)}
        for _ in range(WEIGHTS)
    ]
    x = jax.random.normal(next(keys), (tokens, hidden), jnp.bfloat16)
    return weights, x, jnp.zeros_like(x)


def measure(model: str, tokens: int, options: argparse.Namespace) -> dict:
    """Return microseconds of a layer: by default, and with each product another way.

    All are measured in turns, so that a chip that gets warmer does so for all of them.
    """
    variants: list[tuple[str | None, Way]] = [(None, Way())]
    variants += [(product, way) for product in PRODUCTS for way in ways_for(model, product, tokens)]
    make = jax.jit(functools.partial(arguments, model, tokens))
    shapes = jax.eval_shape(make)

    def build(variant: tuple[str | None, Way]) -> Callable:
        return layers_with(*variant).lower(*shapes).compile()

    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        programs = list(pool.map(build, variants))
    weights, *state = make()

    def microseconds(program: Callable) -> float:
        seconds, _ = kernels.seconds_per_launch(lambda state: program(weights, *state), state)
        return seconds / LAYERS * 1e6

    rounds = [[microseconds(program) for program in programs] for _ in range(options.rounds)]
    rows = [
        {"product": product, "way": str(way), "us": sorted(times)}
        for (product, way), times in zip(variants, zip(*rounds, strict=True), strict=True)
    ]
    return {"tokens": tokens, "rows": rows}


def show(found: dict) -> str:
    """Return the lines of a number of tokens: medians, by how much they differ, and the range."""
    default, *others = found["rows"]
    base = statistics.median(default["us"])
    lines = [f"{found['tokens']} tokens: a layer {base:.1f} us ({_range(default['us'])})"]
    lines += [
        f"  {statistics.median(row['us']) - base:+6.2f} {row['product']}: {row['way']} "
        f"({_range(row['us'])})"
        for row in others
    ]
    return "\n".join(lines)


def _range(times: list[float]) -> str:
    return f"{times[0]:.1f} to {times[-1]:.1f}"


def lower(model: str, tokens: int) -> None:
    """Lower every way for CUDA, on any machine."""
    shapes = jax.eval_shape(functools.partial(arguments, model, tokens))
    with dispatch.lowering_for_hopper():
        for product in PRODUCTS:
            for way in ways_for(model, product, tokens):
                layers_with(product, way).trace(*shapes).lower(lowering_platforms=("cuda",))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama_8b", choices=sorted(cases.LAYERS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--threads", type=int, default=12, help="that compile at once")
    parser.add_argument("--rounds", type=int, default=5, help="in which each is measured once")
    parser.add_argument("--lower", action="store_true", help="lower all, time nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    results = []
    for tokens in options.tokens:
        if options.lower:
            lower(options.model, tokens)
            continue
        results.append(measure(options.model, tokens, options))
        print(show(results[-1]), flush=True)
        if options.out:
            document = {
                "date": datetime.date.today().isoformat(),
                "device": jax.devices()[0].device_kind,
                "versions": {"jax": jax.__version__},
                "command": "python scripts/gpu/layer_products.py " + " ".join(sys.argv[1:]),
                "unit": "us of a layer",
                "results": results,
            }
            options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
