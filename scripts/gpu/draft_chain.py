"""What three heads of an LSTM speculator cost at the size of an 8B model; reduced, and with FP8.

    python scripts/gpu/draft_chain.py --out FILE

The cell of `models/lstm_speculator.py` in a program of its own, random weights, many launches
in flight: whole, with an output matrix of the frequent tokens, with it in FP8, and without it.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from arctic_jax.models.lstm_speculator import GATES, lstm_cell
from arctic_jax.models.speculator import SpeculatorNorm, product
from arctic_jax.serving.environment import record

HEADS = 3
TOKEN_SCALE = 0.7
Weights = dict[str, Any]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="of states and of the model")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--draft-vocab", type=int, default=32_768, help="rows of a reduced head")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    weights = jax.jit(random_weights, static_argnums=(0, 1))(args.size, args.vocab)
    weights["norm"] = SpeculatorNorm(args.size)
    kept = jnp.arange(args.draft_vocab) * (args.vocab // args.draft_vocab)
    reduced = weights | {"head": weights["head"][kept], "token_ids": kept}
    fp8 = weights | {"head": weights["head"].astype(jnp.float8_e4m3fn)}
    no_head = {name: value for name, value in weights.items() if name != "head"}
    rows = []
    for batch in args.batches:
        hidden = jnp.tile(jnp.linspace(-1, 1, args.size, dtype=jnp.bfloat16), (batch, 1))
        tokens = jnp.arange(batch)
        row = {
            "batch": batch,
            "bfloat16_ms": milliseconds(draft, weights, hidden, tokens),
            "reduced_head_ms": milliseconds(draft, reduced, hidden, tokens),
            "fp8_head_ms": milliseconds(draft, fp8, hidden, tokens),
            "no_head_ms": milliseconds(draft, no_head, hidden, tokens),
        }
        rows.append(row)
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    args.out.write_text(json.dumps(record() | {"rows": rows}, indent=1) + "\n")


def random_weights(size: int, vocab: int) -> Weights:
    """First and further projections, embedding and output matrix."""
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def matrix(*shape: int) -> Array:
        return (jax.random.normal(next(keys), shape) * 0.02).astype(jnp.bfloat16)

    return {
        "projections": [matrix(4 * size, size) for _ in range(2)],
        "embedding": matrix(vocab, size),
        "head": matrix(vocab, size),
    }


def draft(weights: Weights, hidden: Array, tokens: Array) -> Array:
    """`[S, size]` states and `[S]` tokens to `[S, HEADS]` drafts; without a head, somehow."""
    drafts, cell = [], jnp.zeros_like(hidden)
    for k in range(HEADS):
        embedded = weights["embedding"][tokens].astype(jnp.float32)
        gates = product(hidden, weights["projections"][min(k, 1)])
        gates += TOKEN_SCALE * jnp.tile(embedded, len(GATES))
        hidden, cell = lstm_cell(gates, cell, weights["norm"], weights["norm"])
        if "head" in weights:
            tokens = jnp.argmax(product(hidden, weights["head"].astype(hidden.dtype)), -1)
            tokens = weights["token_ids"][tokens] if "token_ids" in weights else tokens
        else:
            tokens = (tokens + hidden[:, 0].astype(jnp.int32)) % len(weights["embedding"])
        drafts.append(tokens)
    return jnp.stack(drafts, 1)


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
