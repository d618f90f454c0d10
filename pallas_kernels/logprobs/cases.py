"""Log-probabilities: the named shapes that tests and benchmarks run, and the float64 formula.

The same names as in `paged_attention/cases.py`, read by the same test and the same benchmark.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 2e-6}  # of a logarithm, relative to 1 + |expected|; ids and ranks are exact


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of `vocab` normal logits; in quarters if there shall be ties."""

    name: str
    tags: frozenset[str]
    rows: int
    vocab: int
    top: int
    wanted: bool = True
    ties: bool = False
    dtype: str = "float32"
    race_detection: bool = False  # small enough for the interpreter to look for races


def _case(name: str, rows: int, vocab: int, top: int, tags: str = "ci", **more) -> Case:
    return Case(name, frozenset(tags.split()), rows, vocab, top, **more)


LLAMA_3, SMOLLM2, GPT_2 = 128_256, 49_152, 50_257
CASES = (
    _case("fewer_than_wanted", 2, 5, 8),
    _case("odd_vocab", 3, 1301, 5, race_detection=True),
    _case("even_vocab", 2, 2050, 3),
    _case("ties", 3, 700, 9, ties=True),
    _case("none_of_the_likeliest", 2, 900, 0),
    _case("many_blocks", 2, 4100, 4),
    _case("not_wanted", 2, 900, 3, wanted=False),
    # Too slow for an interpreter: the kernel on a GPU, and XLA.
    _case("llama_3", 16, LLAMA_3, 20, "gpu"),
    _case("smollm2", 5, SMOLLM2, 20, "gpu", ties=True),
    _case("gpt_2", 5, GPT_2, 3, "gpu"),
    # What the H200 is measured on.
    *(
        _case(f"{name}_b{rows}", rows, LLAMA_3, top, "bench", wanted=wanted)
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
