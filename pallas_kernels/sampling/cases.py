"""Sampling: the named shapes that tests and benchmarks run, and the float64 formula, which sorts.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases
from arctic_jax.pallas_kernels.sampling.reference import IN_PROMPT

TOLERANCE = {"float32": 0.0}  # tokens, not numbers
STATE_ROWS, BIAS_ROWS = 3, 4


@dataclasses.dataclass(frozen=True)
class Params:
    """What one row asks for."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    state_row: int = -1
    own_bias_row: int | None = None  # another than `state_row`
    allowed: int | None = None  # tokens that its row of the bias does not forbid
    damage: float | None = None  # in place of one of its logits

    @property
    def bias_row(self) -> int:
        """The row of the bias."""
        return self.state_row if self.own_bias_row is None else self.own_bias_row


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """Rows of normal logits, with deviation `spread`; in quarters if there shall be ties."""

    vocab: int
    rows: Sequence[Params]
    _: dataclasses.KW_ONLY
    spread: float = 3.0
    ties: bool = False
    dtype: str = "float32"


GREEDY, WARM = Params(), Params(temperature=0.8)
TOP_K_TOP_P = Params(temperature=0.8, top_k=50, top_p=0.95)
ADJUSTED = Params(
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.02,
    repetition_penalty=1.1,
    frequency_penalty=0.3,
    presence_penalty=0.2,
    state_row=0,
)
LLAMA_3, SMOLLM2, GPT_2 = 128_256, 49_152, 50_257
MIXED = (
    GREEDY,
    WARM,
    Params(temperature=1.3, top_k=7),
    Params(temperature=1.0, top_p=0.6),
    Params(temperature=2.0, min_p=0.3),
    TOP_K_TOP_P,
    ADJUSTED,
    dataclasses.replace(ADJUSTED, temperature=0.0, state_row=2, repetition_penalty=0.8),
)
EXTREMES = (
    Params(temperature=1e-30),
    Params(temperature=1e30, top_k=3),
    Params(temperature=1.0, top_k=1),
    Params(temperature=1.0, top_k=-1, top_p=1e-6),
    Params(temperature=1.0, top_k=2**31 - 1, top_p=0.999),
    Params(temperature=1.0, min_p=1.0),
    Params(temperature=1.0, state_row=1, allowed=2),
    Params(temperature=1.0, state_row=1, allowed=2, top_k=5, top_p=0.99),
    Params(temperature=1.0, state_row=1, own_bias_row=3, allowed=7, repetition_penalty=1.2),
)
DAMAGED = (
    Params(damage=np.nan),
    Params(damage=np.inf, temperature=1.0, top_p=0.5),
    Params(damage=-np.inf),
    Params(temperature=1.0, top_k=9, top_p=0.5, state_row=0, allowed=0),
    Params(state_row=0, allowed=0),
    Params(temperature=1.0, top_k=9, state_row=2, repetition_penalty=1e-39),
    WARM,
)

CASES = (
    Case("tiny_vocab", 12, MIXED, ties=True),
    Case("odd_vocab", 1301, MIXED, race_detection=True),
    Case("even_vocab", 2050, MIXED),
    Case("ties", 700, [dataclasses.replace(p, state_row=-1) for p in MIXED], ties=True),
    Case("extremes", 1300, EXTREMES),
    Case("damaged", 900, DAMAGED),
    Case("many_blocks", 4100, [Params(temperature=1.0, top_k=20, top_p=0.8), GREEDY]),
    # Too slow for an interpreter: the kernel on a GPU, and XLA.
    Case("llama_3", LLAMA_3, MIXED * 4, tags="gpu"),
    Case("smollm2", SMOLLM2, MIXED * 2 + EXTREMES, tags="gpu"),
    Case("gpt_2", GPT_2, MIXED * 2 + DAMAGED, tags="gpu"),
    # What the H200 is measured on.
    *(
        Case(f"{name}_b{rows}", LLAMA_3, [params] * rows, tags="bench")
        for rows in (1, 64, 256)
        for name, params in (
            ("greedy", GREEDY),
            ("temperature", WARM),
            ("top_k_top_p", TOP_K_TOP_P),
            ("everything", ADJUSTED),
        )
    ),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.sampling`; with `poison`, it is in the state nobody refers to."""
    rng = np.random.default_rng(seed)
    R, V = len(case.rows), case.vocab
    logits = rng.normal(size=(R, V)).astype(np.float32) * np.float32(case.spread)
    if case.ties:
        logits = np.round(logits * 4) / 4
    seen = rng.integers(0, 3, (STATE_ROWS, V)) | np.where(
        rng.random((STATE_ROWS, V)) < 0.5, IN_PROMPT, 0
    )
    bias = rng.normal(size=(BIAS_ROWS, V)).astype(np.float32)
    for row, params in enumerate(case.rows):
        if params.damage is not None:
            logits[row, rng.integers(V)] = params.damage
        if params.allowed is not None:
            bias[params.bias_row, params.allowed :] = -np.inf
    if poison is not None:
        used = {params.bias_row for params in case.rows}
        bias[[row for row in range(BIAS_ROWS) if row not in used]] = poison
    floats = ("repetition_penalty", "frequency_penalty", "presence_penalty", "temperature", "min_p")

    def each(name: str, dtype: str) -> jax.Array:
        return jnp.asarray(np.array([getattr(params, name) for params in case.rows]), dtype)

    arguments = (
        jnp.asarray(logits),
        jnp.asarray(seen, jnp.int32),
        jnp.asarray(bias),
        each("state_row", "int32"),
        each("bias_row", "int32"),
        *(each(name, "float32") for name in floats),
        each("top_k", "int32"),
        each("top_p", "float32"),
        jnp.asarray(rng.integers(-(2**31), 2**31, (R, 2)), jnp.int32),
        jnp.asarray(rng.integers(0, 1000, R), jnp.int32),
    )
    return arguments, {}


def _adjusted(logits, seen, bias, repetition, frequency, presence) -> np.ndarray:
    count = seen & (IN_PROMPT - 1)
    repetition = np.where(seen > 0, repetition, 1.0)
    x = np.where(logits > 0, logits / repetition, logits * repetition)
    return x - frequency * count - presence * (count > 0) + bias


def _kept(distance: np.ndarray, min_p, top_k, top_p) -> np.ndarray:
    """Return which tokens are drawn from, of distances below the likeliest."""
    kept = np.exp(-distance) >= min_p
    if 0 < top_k < kept.sum():
        kept &= distance <= np.sort(distance[kept])[top_k - 1]
    if top_p < 1:
        near = np.sort(distance[kept])
        mass = np.cumsum(np.exp(-near))
        last = np.searchsorted(mass, top_p * mass[-1])
        kept &= distance <= near[min(last, len(near) - 1)]
    return kept


def _noise(seed: np.ndarray, step: int, size: int) -> np.ndarray:
    key = jax.random.wrap_key_data(jnp.asarray(seed.view(np.uint32)), impl="threefry2x32")
    key = jax.random.fold_in(key, step)
    tiny = float(np.finfo(np.float32).tiny)
    uniform = jax.random.uniform(key, (size,), jnp.float32, minval=tiny, maxval=1.0)
    return -np.log(-np.log(np.asarray(uniform, np.float64)))


def expected(case: Case, arguments: tuple, keywords: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens, NaN where any will do, and whether the row is finite."""
    del keywords
    logits, seen, bias, *vectors = (np.asarray(a) for a in arguments)
    tokens, finite = np.full(len(logits), np.nan), np.zeros(len(logits))
    for row, x in enumerate(logits.astype(np.float64)):
        state_row, bias_row, *penalties, temperature, min_p, top_k, top_p, seed, step = (
            v[row] if v.ndim > 1 else v[row].item() for v in vectors
        )
        if not np.isfinite(x).all():
            continue
        if state_row >= 0:
            x = _adjusted(x, seen[state_row], bias[bias_row].astype(np.float64), *penalties)
        if not np.abs(x.max()) <= np.finfo(np.float32).max:
            continue
        finite[row] = 1
        if temperature > 0:
            distance = (x.max() - x) / temperature
            kept = _kept(distance, min_p, top_k, top_p)
            x = np.where(kept, _noise(seed, step, case.vocab) - distance, -np.inf)
        tokens[row] = x.argmax()
    return tokens, finite


def comparable(case: Case, output: tuple, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return tokens and flags as float64; every token must be one."""
    tokens, finite = (np.asarray(a).astype(np.float64) for a in output)
    if ((tokens < 0) | (tokens >= case.vocab)).any():
        raise AssertionError(f"{case.name}: {tokens=}")
    return tokens, finite


def following(arguments: tuple, output: tuple) -> tuple:
    """Return `arguments` with a logit that depends on the output, so that calls wait in turn.

    Writing it costs every implementation about 2 µs.
    """
    logits = arguments[0].at[0, 0].set(-1e-3 * sum(x[0].astype(jnp.float32) for x in output))
    return (logits, *arguments[1:-1], output[0])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be read (logits, and the state of adjusted rows)."""
    adjusted = sum(params.state_row >= 0 for params in case.rows)
    return 4.0 * case.vocab * (len(case.rows) + 2 * adjusted), 0.0
