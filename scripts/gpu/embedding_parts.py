"""What the parts of a BERT layer take on the GPU, each alone, and what else they could be.

    python scripts/gpu/embedding_parts.py [--tokens 32768] [--filter TEXT] --out FILE.json

The shapes are those of BERT-base. Calls are started one after another without waiting.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from arctic_jax.pallas_kernels.add_layer_norm import mosaic_gpu as layer_norm
from arctic_jax.pallas_kernels.gelu import gelu
from arctic_jax.pallas_kernels.segment_attention import mosaic_gpu, reference

HIDDEN, WIDE, HEADS, SIZE = 768, 3072, 12, 64
REPEATS = 20
FP8 = jnp.float8_e4m3fn
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "erfc": functools.partial(jax.nn.gelu, approximate=False),
    "erf": lambda x: (lambda w: 0.5 * w * (1 + jax.lax.erf(w * 0.5**0.5)))(
        x.astype(jnp.float32)
    ).astype(x.dtype),
    "polynomial": gelu,
    "tanh": jax.nn.gelu,
    "none": lambda x: x,
}


def seconds(function: Callable[..., Any], *arguments: Array) -> float:
    """Return the least time of a call, of three rounds."""
    call, times = jax.jit(function), []
    jax.block_until_ready([call(*arguments) for _ in range(3)])
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([call(*arguments) for _ in range(REPEATS)])
        times.append((time.perf_counter() - start) / REPEATS)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--filter", default="")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for parts in (products, norms, attentions):
        for name, function, operands, bytes_moved, flops in parts(arguments.tokens):
            if arguments.filter not in name:
                continue
            row: dict[str, Any] = {"name": name}
            try:
                found = seconds(function, *operands)
                row |= {"us": found * 1e6, "gb_per_s": bytes_moved / found / 1e9}
                row["tflop_per_s"] = flops / found / 1e12
                figures = f"{row['us']:9.1f} us {row['gb_per_s']:7.0f} GB/s"
                print(f"{name:44}{figures} {row['tflop_per_s']:6.1f} TFLOP/s", flush=True)
            except Exception as error:  # one that does not run must not cost the others
                row["error"] = repr(error)[:300]
                print(f"{name:44}{row['error']}", flush=True)
            rows.append(row)
            if arguments.out is not None:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


Part = tuple[str, Callable[..., Any], tuple[Array, ...], float, float]


def normal(number: int, *shape: int) -> Array:
    """Return numbers for a part to work on."""
    return jax.random.normal(jax.random.key(number), shape, jnp.bfloat16)


def products(T: int) -> list[Part]:
    """Return the matrix products, what follows them, and products of 8-bit numbers."""
    parts: list[Part] = []
    shapes = {
        "qkv": (HIDDEN, 3 * HIDDEN),
        "output": (HIDDEN, HIDDEN),
        "up": (HIDDEN, WIDE),
        "down": (WIDE, HIDDEN),
    }
    for name, (K, N) in shapes.items():
        x, weight, bias = normal(0, T, K), normal(1, K, N) * 0.03, normal(2, N)
        moved, flops = 2.0 * (T * K + K * N + T * N), 2.0 * T * K * N
        parts.append((f"{name}: product", jnp.matmul, (x, weight), moved, flops))
        linear = lambda x, w, b: x @ w + b
        parts.append((f"{name}: product, bias", linear, (x, weight, bias), moved, flops))
        turned = lambda x, w, b: x @ w.T + b
        operands = x, jnp.array(weight.T), bias
        parts.append((f"{name}: product, bias, [out, in]", turned, operands, moved, flops))
        eight = x.astype(FP8), jnp.array(weight.T).astype(FP8), bias

        def scaled(x: Array, w: Array, b: Array) -> Array:
            half = jnp.bfloat16(0.5)
            return (x.astype(half.dtype) * half) @ (w.astype(half.dtype) * half).T + b

        parts.append((f"{name}: 8-bit product, bias", scaled, eight, moved / 2, flops))
    x, weight, bias = normal(0, T, HIDDEN), normal(1, HIDDEN, WIDE) * 0.03, normal(2, WIDE)
    wide = normal(3, T, WIDE)
    for name, function in ACTIVATIONS.items():
        whole = lambda x, w, b, function=function: function(x @ w + b)
        flops = 2.0 * T * HIDDEN * WIDE
        parts.append(
            (f"up: product, bias, {name}", whole, (x, weight, bias), 2.0 * wide.size, flops)
        )
        parts.append((f"activation: {name}", function, (wide,), 4.0 * wide.size, 0.0))
    return parts


def norms(T: int) -> list[Part]:
    """Return residual addition and LayerNorm, with the variance in two passes and in one."""

    def norm(
        x: Array, delta: Array, delta_bias: Array, weight: Array, bias: Array, one_pass: bool
    ) -> Array:
        wide = (x + delta + delta_bias).astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True)
        if one_pass:
            variance = (wide * wide).mean(-1, keepdims=True) - mean * mean
        else:
            variance = ((wide - mean) ** 2).mean(-1, keepdims=True)
        normed = (wide - mean) * jax.lax.rsqrt(variance + 1e-12)
        return (normed * weight + bias).astype(x.dtype)

    operands = normal(0, T, HIDDEN), normal(1, T, HIDDEN), *normal(2, 3, HIDDEN)
    kernel = functools.partial(layer_norm.add_layer_norm, epsilon=1e-12)
    functions = {
        "norm: two passes": functools.partial(norm, one_pass=False),
        "norm: one pass": functools.partial(norm, one_pass=True),
        "norm: kernel": kernel,
    }
    return [(name, f, operands, 6.0 * T * HIDDEN, 0.0) for name, f in functions.items()]


def attentions(T: int) -> list[Part]:
    """Return attention of texts of 50 and of 512 tokens, by XLA, by cuDNN and by the kernel."""
    parts: list[Part] = []
    qkv = normal(0, T, 3 * HEADS, SIZE)
    moved = 2.0 * 4 * T * HIDDEN
    for length, windows in ((50, (64, 512)), (512, (512,))):
        for window in windows:
            count = window // length
            place = np.arange(T, dtype=np.int32)
            within = place % window
            is_text = within < count * length
            starts = np.where(is_text, place - within % length, place)
            bounds = jnp.asarray([starts, starts + np.where(is_text, length, 1)])
            flops = 4.0 * T // window * count * length**2 * HIDDEN
            name = f"attention: {length} in {window}"
            options = {"num_kv_heads": HEADS, "scale": SIZE**-0.5, "causal": False}
            xla = functools.partial(reference.segment_attention, **options, window=window)
            parts.append((f"{name}, xla", xla, (qkv, bounds), moved, flops))
            for tile in (64, 128):
                for stages in (1, 2, 3):
                    config = mosaic_gpu.Config(tile, stages)
                    kernel = functools.partial(
                        mosaic_gpu.segment_attention, **options, config=config
                    )
                    sizes = f"tile {tile}, {stages} stages"
                    parts.append((f"{name}, {sizes}", kernel, (qkv, bounds), moved, flops))

            def cudnn(qkv: Array, bounds: Array, window: int = window) -> Array:
                q, k, v = (x.reshape(-1, window, HEADS, SIZE) for x in jnp.split(qkv, 3, axis=1))
                return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

            parts.append((f"{name}, cuDNN without mask", cudnn, (qkv, bounds), moved, flops))
    return parts


if __name__ == "__main__":
    main()
