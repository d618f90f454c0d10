"""What three heads of an LSTM speculator cost at the size of an 8B model; and with FP8.

    python scripts/gpu/draft_chain.py --out FILE

The arithmetic of `models/lstm_speculator.py` in a program of its own, random weights, many launches
in flight: whole, with the output matrix in FP8, and without output matrix.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

HEADS = 3
Weights = dict[str, Any]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="of states and of the model")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    weights = jax.jit(random_weights, static_argnums=(0, 1))(args.size, args.vocab)
    fp8 = weights | {"head": weights["head"].astype(jnp.float8_e4m3fn)}
    rows = []
    for batch in args.batches:
        hidden = jnp.tile(jnp.linspace(-1, 1, args.size, dtype=jnp.bfloat16), (batch, 1))
        tokens = jnp.arange(batch)
        row = {
            "batch": batch,
            "bfloat16_ms": milliseconds(draft, weights, hidden, tokens),
            "fp8_head_ms": milliseconds(draft, fp8, hidden, tokens),
            "no_head_ms": milliseconds(without_head, weights, hidden, tokens),
        }
        rows.append(row)
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    document = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


def random_weights(size: int, vocab: int) -> Weights:
    """First and further projections, norms, embedding and output matrix."""
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def matrix(*shape: int) -> Array:
        return (jax.random.normal(next(keys), shape) * 0.02).astype(jnp.bfloat16)

    return {
        "projections": [matrix(4 * size, size) for _ in range(2)],
        "embedding": matrix(vocab, size),
        "head": matrix(vocab, size),
        "norms": jnp.ones((4, size), jnp.bfloat16),
    }


def draft(weights: Weights, hidden: Array, tokens: Array) -> Array:
    """`[S, size]` states and `[S]` tokens to `[S, HEADS]` drafts."""
    drafts, state = [], (hidden, jnp.zeros_like(hidden))
    for k in range(HEADS):
        state = advance(weights, k, state, tokens)
        tokens = jnp.argmax(product(state[0], weights["head"]), -1)
        drafts.append(tokens)
    return jnp.stack(drafts, 1)


def without_head(weights: Weights, hidden: Array, tokens: Array) -> Array:
    """The same with tokens that come from the states, somehow."""
    drafts, state = [], (hidden, jnp.zeros_like(hidden))
    for k in range(HEADS):
        state = advance(weights, k, state, tokens)
        tokens = (tokens + state[0][:, 0].astype(jnp.int32)) % len(weights["embedding"])
        drafts.append(tokens)
    return jnp.stack(drafts, 1)


def advance(
    weights: Weights, k: int, state: tuple[Array, Array], tokens: Array
) -> tuple[Array, Array]:
    """One head: gates, cell and state."""
    hidden, cell = state
    embedded = weights["embedding"][tokens].astype(jnp.float32)
    gates = product(hidden, weights["projections"][min(k, 1)]) + 0.7 * jnp.tile(embedded, 4)
    forget, write, output, candidate = jnp.split(gates, 4, -1)
    weight, bias, state_weight, state_bias = weights["norms"].astype(jnp.float32)
    candidate = jax.nn.gelu(norm(candidate, weight, bias), approximate=False)
    kept = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(write) * candidate
    shown = jax.nn.gelu(norm(kept, state_weight, state_bias), approximate=False)
    return (jax.nn.sigmoid(output) * shown).astype(hidden.dtype), kept.astype(hidden.dtype)


def norm(x: Array, weight: Array, bias: Array) -> Array:
    """By the root mean square."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight + bias


def product(x: Array, weight: Array) -> Array:
    """`x [S, in]` times `weight [out, in]`, which may be of a smaller type."""
    weight = weight.astype(x.dtype)
    return jnp.einsum("si,oi->so", x, weight, preferred_element_type=jnp.float32)


def milliseconds(function: Callable[..., Array], *arguments: Any, launches: int = 50) -> float:
    """Time of one of many launches, the best of four rounds."""
    program = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready([program(*arguments) for _ in range(launches)])
        best = min(best, (time.perf_counter() - start) / launches * 1e3)
    return best


if __name__ == "__main__":
    main()
