"""Verification: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for. The formula draws one token after the other,
as an engine without drafts does.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases
from arctic_jax.pallas_kernels.sampling import cases as sampling_cases
from arctic_jax.pallas_kernels.sampling.cases import ADJUSTED, GREEDY, TOP_K_TOP_P, WARM, Params

TOLERANCE = {"float32": 0.0}  # tokens, not numbers


@dataclasses.dataclass(frozen=True)
class Chain:
    """One request's rows: `length` drafted tokens, each after the one before it, or a tree.

    With `parents` it is a tree: of each token the index of the one that it follows, -1 for the
    token before the draft. On the path to the last token the first `likely` have high logits.
    """

    params: Params
    length: int = 0
    likely: int = 0
    parents: tuple[int, ...] = ()

    def parent(self, token: int) -> int:
        """Return the index of the drafted token before one."""
        return self.parents[token] if self.parents else token - 1

    def path(self, token: int) -> list[int]:
        """Return the drafted tokens up to one, from the first."""
        return [] if token < 0 else [*self.path(self.parent(token)), token]

    def mask(self) -> list[int]:
        """Return the `draft_mask` of its rows."""
        if not self.parents:
            return [-1] * (1 + self.length)
        hidden = ([i - j for j in range(i) if j not in self.path(i)] for i in range(self.length))
        return [-1, *(-1 - sum(1 << distance for distance in others) for others in hidden)]


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """Chains, one after the other; drafts repeat tokens where `vocab` allows it.

    Races are looked for in `sampling`, whose kernel it is.
    """

    vocab: int
    chains: Sequence[Chain]
    _: dataclasses.KW_ONLY
    dtype: str = "float32"


COUNTED = dataclasses.replace(ADJUSTED, temperature=0.0, frequency_penalty=8.0)
BOOSTED = dataclasses.replace(COUNTED, repetition_penalty=0.7, presence_penalty=4.0, state_row=1)
RAGGED = (
    Chain(GREEDY, 3, likely=3),
    Chain(GREEDY),
    Chain(WARM, 4, likely=2),
    Chain(GREEDY, 2),
    Chain(TOP_K_TOP_P, 1, likely=1),
    Chain(ADJUSTED, 3, likely=3),
    Chain(WARM),
)
DAMAGED = (
    Chain(dataclasses.replace(GREEDY, damage=np.nan), 2, likely=2),
    Chain(dataclasses.replace(COUNTED, damage=np.inf), 2, likely=2),
    Chain(dataclasses.replace(COUNTED, repetition_penalty=1e30), 2, likely=2),
    Chain(GREEDY, 2, likely=2),
)

FORK = (-1, 0, 1, 0, -1, 4, 4)
TREES = (
    Chain(GREEDY, 7, likely=2, parents=FORK),
    Chain(COUNTED, 7, likely=1, parents=FORK),
    Chain(WARM, 3, likely=3, parents=(-1, -1, -1)),
    Chain(BOOSTED, 31, likely=14, parents=(*range(-1, 15), 9, *range(16, 30))),
    Chain(ADJUSTED),
    Chain(TOP_K_TOP_P, 4, likely=4, parents=(-1, 0, 0, 2)),
)

CASES = (
    Case("ragged", 1301, RAGGED),
    Case("repeated_drafts", 12, [Chain(p, 5, likely=5) for p in (COUNTED, BOOSTED) * 8]),
    Case("damaged", 900, DAMAGED),
    Case("no_drafts", 700, [Chain(WARM), Chain(COUNTED)]),
    Case("trees", 1301, (*TREES, *RAGGED[:3])),
    Case("trees_of_few_tokens", 40, TREES * 4),
    # Too slow for an interpreter: the kernel on a GPU, and XLA.
    Case("llama_3", sampling_cases.LLAMA_3, RAGGED * 4, tags="gpu"),
    # What the H200 is measured on.
    *(
        Case(f"{name}_b{requests}_k8", sampling_cases.LLAMA_3, chains * requests, tags="bench")
        for requests in (1, 16)
        for name, chains in (
            ("greedy", [Chain(GREEDY, 8, likely=8)]),
            ("everything", [Chain(ADJUSTED, 8, likely=8)]),
        )
    ),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.verification`; for `poison` see `sampling`."""
    rows = [chain.params for chain in case.chains for _ in range(1 + chain.length)]
    plain = [dataclasses.replace(params, damage=None) for params in rows]
    beneath = sampling_cases.Case(case.name, case.vocab, plain)
    arguments, _ = sampling_cases.inputs(beneath, seed, poison)
    rng = np.random.default_rng(seed + 1)
    logits = rng.normal(size=(len(rows), case.vocab)).astype(np.float32) * 3
    seeds, step = rng.integers(-(2**31), 2**31, (len(rows), 2)), rng.integers(0, 1000, len(rows))
    draft = np.full(len(rows), -1)
    begin = 0
    for chain in case.chains:
        end = begin + 1 + chain.length
        seeds[begin:end] = seeds[begin]
        step[begin:end] = step[begin] + np.arange(1 + chain.length)
        draft[begin : end - 1] = rng.integers(0, min(case.vocab, 50), chain.length)
        if chain.parents:  # tokens that come after the same one differ
            draft[begin : end - 1] = rng.permutation(min(case.vocab, 50))[: chain.length]
        for token in chain.path(chain.length - 1)[: chain.likely]:
            logits[begin + 1 + chain.parent(token), draft[begin + token]] += 14
        if chain.params.damage is not None:
            logits[end - 1, rng.integers(case.vocab)] = chain.params.damage
        begin = end
    arrays = [seeds, step, draft]
    if any(chain.parents for chain in case.chains):
        arrays.append(np.concatenate([chain.mask() for chain in case.chains]))
    integers = (jnp.asarray(array, jnp.int32) for array in arrays)
    longest = max(chain.length for chain in case.chains)
    return (jnp.asarray(logits), *arguments[1:-2], *integers), {"max_draft_len": longest}


def expected(case: Case, arguments: tuple, keywords: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and whether the row is finite, NaN where anything will do."""
    del keywords
    logits, seen, bias, *vectors = (np.asarray(a) for a in arguments)
    if any(chain.parents for chain in case.chains):
        vectors.pop()
    state_row, draft = vectors[0], vectors.pop()
    tokens, finite = np.full(len(logits), -1.0), np.full(len(logits), np.nan)
    one = sampling_cases.Case(case.name, case.vocab, [Params()])
    begin = 0
    for chain in case.chains:
        for token in range(-1, chain.length):
            row = begin + 1 + token
            if token >= 0:
                before = tokens[begin + 1 + chain.parent(token)]
                if before != draft[begin + token]:
                    tokens[row] = before if np.isnan(before) else -1  # NaN: it may be anything
                    continue
            state = seen.copy()
            for earlier in chain.path(token) if state_row[row] >= 0 else ():
                state[state_row[row], draft[begin + earlier]] += 1
            pick = [v[row : row + 1] for v in vectors]
            drawn, good = sampling_cases.expected(
                one, (logits[row : row + 1], state, bias, *pick), {}
            )
            tokens[row], finite[row] = drawn[0], good[0]
        begin += 1 + chain.length
    return tokens, finite


def comparable(case: Case, output: tuple, arguments: tuple) -> tuple[np.ndarray, ...]:
    """Return tokens and flags as float64; every token must be one, or -1."""
    tokens, finite = (np.asarray(a).astype(np.float64) for a in output)
    if ((tokens < -1) | (tokens >= case.vocab)).any():
        raise AssertionError(f"{case.name}: {tokens=}")
    return tokens, finite


def following(arguments: tuple, output: tuple) -> tuple:
    """Return `arguments` with a logit that depends on the output, so that calls wait in turn."""
    logits = arguments[0].at[0, 0].set(-1e-3 * sum(x[0].astype(jnp.float32) for x in output))
    return (logits, *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be read (logits, and the state of adjusted rows)."""
    rows = sum(1 + chain.length for chain in case.chains)
    adjusted = sum(1 + c.length for c in case.chains if c.params.state_row >= 0)
    return 4.0 * case.vocab * (rows + 2 * adjusted), 0.0
