"""Log-probabilities: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

TOLERANCE = {"float32": 2e-6}  # of a logarithm, relative to 1 + |expected|; ids and ranks are exact


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """Rows of `vocab` normal logits; in quarters if there shall be ties."""

    rows: int
    vocab: int
    top: int
    _: dataclasses.KW_ONLY
    wanted: bool = True
    ties: bool = False
    dtype: str = "float32"


LLAMA_3, SMOLLM2, GPT_2 = 128_256, 49_152, 50_257
CASES = (
    Case("fewer_than_wanted", 2, 5, 8),
    Case("odd_vocab", 3, 1301, 5, race_detection=True),
    Case("even_vocab", 2, 2050, 3),
    Case("ties", 3, 700, 9, ties=True),
    Case("none_of_the_likeliest", 2, 900, 0),
    Case("many_blocks", 2, 4100, 4),
    Case("not_wanted", 2, 900, 3, wanted=False),
    # Too slow for an interpreter: the kernel on a GPU, and XLA.
    Case("llama_3", 16, LLAMA_3, 20, tags="gpu"),
    Case("smollm2", 5, SMOLLM2, 20, tags="gpu", ties=True),
    Case("gpt_2", 5, GPT_2, 3, tags="gpu"),
    # What the H200 is measured on.
    *(
        Case(f"{name}_b{rows}", rows, LLAMA_3, top, tags="bench", wanted=wanted)
        for rows in (1, 64, 256)
        for name, top, wanted in (("not_wanted", 20, False), ("top_20", 20, True))
    ),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.logprobs`; nothing is there that must not be read."""
    del poison
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(case.rows, case.vocab)).astype(np.float32) * 3
    if case.ties:
        logits = np.round(logits * 4) / 4
    target = jnp.asarray(rng.integers(0, case.vocab, case.rows), jnp.int32)
    return (jnp.asarray(logits), target, jnp.int32(case.wanted)), {"top": case.top}


def expected(case: Case, arguments: tuple, keywords: dict) -> tuple[np.ndarray, ...]:
    """Return the four outputs in float64, from a sort."""
    top = keywords["top"]
    logits, target = (np.asarray(a) for a in arguments[:2])
    shapes = (case.rows,), (case.rows,), (case.rows, top), (case.rows, top)
    logprob, rank, ids, best = (np.zeros(shape) for shape in shapes)
    for row, x in enumerate(logits.astype(np.float64)):
        if not case.wanted:
            continue
        x = x - x.max()
        x = x - np.log(np.exp(x).sum())
        order = np.argsort(-x, kind="stable")[:top]
        logprob[row], rank[row] = x[target[row]], 1 + (x > x[target[row]]).sum()
        ids[row, : len(order)], best[row, : len(order)] = order, x[order]
    return logprob, rank, ids, best


def comparable(case: Case, output: tuple, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return the four outputs as float64."""
    return tuple(np.asarray(a).astype(np.float64) for a in output)


def following(arguments: tuple, output: tuple) -> tuple:
    """Return `arguments` with a logit that depends on the output, so that calls wait in turn.

    Writing it costs every implementation about 2 µs.
    """
    logits = arguments[0].at[0, 0].set(-1e-3 * sum(x[0].sum().astype(jnp.float32) for x in output))
    return (logits, *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be read."""
    return 4.0 * case.vocab * case.rows * case.wanted, 0.0
