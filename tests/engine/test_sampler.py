"""The sampler against float64 numpy that sorts: sets, distributions, penalties, reports."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from arctic_jax.batch import ForwardBatch, StepOutput
from arctic_jax.engine import sampler
from arctic_jax.engine.sampler import IN_PROMPT, SamplerState
from arctic_jax.pallas_kernels.sampling import reference

DRAWS, VOCAB = 4096, 12
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
_sample = jax.jit(sampler.sample, static_argnums=3)


def make_batch(
    requests: list[dict[str, Any]],
    row_seq: np.ndarray | list[int],
    row_step: np.ndarray | list[int] | None = None,
    row_target: list[int] | None = None,
    want_logprobs: bool = False,
) -> ForwardBatch:
    """A batch of requests, each `NEUTRAL` but for what is given, also `seed` and `state_row`."""
    rows, seqs = len(row_seq), len(requests)

    def each(name: str, dtype: Any) -> jax.Array:
        return jnp.asarray([request.get(name, NEUTRAL[name]) for request in requests], dtype)

    seeds = np.array([request.get("seed", 0) for request in requests], np.int64)
    unused = jnp.zeros(1, jnp.int32)
    return ForwardBatch(
        token_ids=unused,
        token_source=unused,
        before_row=unused,
        before_drafted=unused,
        before_stride=unused,
        before_rounds=unused,
        positions=unused,
        slot_mapping=unused,
        query_start_loc=unused,
        seq_lens=unused,
        block_tables=unused,
        logit_rows=unused,
        row_seq=jnp.asarray(row_seq, jnp.int32),
        row_target=jnp.asarray(row_target or [-1] * rows, jnp.int32),
        row_step=jnp.asarray(row_step if row_step is not None else [0] * rows, jnp.int32),
        row_draft=jnp.full(rows, -1, jnp.int32),
        draft_mask=None,
        row_mask=jnp.full(rows, -1, jnp.int32),
        state_row=jnp.asarray([request.get("state_row", -1) for request in requests], jnp.int32),
        top_k=each("top_k", jnp.int32),
        **{name: each(name, jnp.float32) for name in NEUTRAL if name != "top_k"},
        seed=jnp.asarray(seeds.view(np.int32).reshape(seqs, 2)),
        want_logprobs=jnp.asarray(want_logprobs, jnp.int32),
        max_query_len=1,
        num_rounds=None,
    )


def sample(
    logits: np.ndarray,
    batch: ForwardBatch,
    state: SamplerState | None = None,
    max_logprobs: int = 3,
) -> tuple[StepOutput, SamplerState]:
    state = state or SamplerState.zeros(2, logits.shape[1])
    return _sample(jnp.asarray(logits, jnp.float32), batch, state, max_logprobs)


def draw_many(logits: list[float], **params: Any) -> np.ndarray:
    """How often each token comes in `DRAWS` steps of one request."""
    rows = np.tile(np.array(logits, np.float32), (DRAWS, 1))
    batch = make_batch([params], np.zeros(DRAWS, int), np.arange(DRAWS))
    tokens = np.asarray(sample(rows, batch)[0].token_ids)
    return np.bincount(tokens, minlength=len(logits))


def expected_distribution(
    logits: list[float],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """Probabilities in the documented order: temperature, min-p, top-k, top-p; ties are kept."""
    x = np.asarray(logits, np.float64) / temperature
    p = np.exp(x - x.max())
    p[p < min_p * (1 - 1e-12)] = 0
    if 0 < top_k < len(p):
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    if top_p < 1:
        down = np.sort(p)[::-1]
        needed = np.searchsorted(np.cumsum(down), top_p * (1 - 1e-12))
        p[p < down[min(needed, len(p) - 1)]] = 0
    return p / p.sum()


def check_distribution(counts: np.ndarray, p: np.ndarray) -> None:
    """Pearson's statistic, with a bound that is passed but once in a million by the right one."""
    draws = counts.sum()
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(p)), "a token outside of the set"
    likely = p * draws >= 5
    assert (counts[likely] > 0).all(), "a token of the set never came"
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(p[likely], p[~likely].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    assert statistic <= freedom + 7 * np.sqrt(2 * freedom) + 20


LOGITS = [2.0, 1.5, 1.5, 1.0, 0.5, 0.25, 0.0, -0.25, -0.5, -1.0, -1.5, -3.0]
SETS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 2},  # the second and third are equal: both stay
    {"top_k": 3},
    {"top_k": 5},
    {"top_k": VOCAB},
    {"top_k": VOCAB + 1},
    {"top_k": 2**31 - 1},
    {"top_k": -1},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.8},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.3},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("params", SETS, ids=str)
def test_sets_and_frequencies(params: dict[str, Any]) -> None:
    check_distribution(draw_many(LOGITS, **params), expected_distribution(LOGITS, **params))


def test_the_order_of_operations_shows() -> None:
    # Heat before min-p: at temperature 2 the fourth token's weight is exp(-0.5) > 0.6.
    hot = draw_many(LOGITS, temperature=2.0, min_p=0.6)
    assert set(np.flatnonzero(hot)) == {0, 1, 2, 3}
    assert set(np.flatnonzero(draw_many(LOGITS, temperature=1.0, min_p=0.6))) == {0, 1, 2}
    # Top-k before top-p: of the first three alone, 0.6 of the mass is two; of all it is four.
    logits = [3.0, 2.9, 2.8, *[2.7 - i / 100 for i in range(9)]]
    assert set(np.flatnonzero(draw_many(logits, top_k=3, top_p=0.6))) == {0, 1}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=VOCAB, max_size=VOCAB),
    st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    st.integers(-1, VOCAB + 2),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.02, 0.11, 0.4]),
)
def test_any_parameters(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = {"temperature": temperature, "top_k": top_k, "min_p": min_p}
    before = np.sort(expected_distribution(logits, **params))[::-1]
    assume((np.abs(np.cumsum(before) - top_p) > 1e-4).all() or top_p == 1)
    relative = np.exp((np.array(logits) - max(logits)) / temperature)
    assume((np.abs(relative - min_p) > 1e-4).all())
    params["top_p"] = top_p
    check_distribution(draw_many(logits, **params), expected_distribution(logits, **params))


def test_equal_tokens_stay_together() -> None:
    for params in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}):
        counts = draw_many([1.0] * VOCAB, **params)
        check_distribution(counts, np.full(VOCAB, 1 / VOCAB))


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-38])
def test_tiny_temperatures_take_the_likeliest(temperature: float) -> None:
    logits = [30.0, 80.0, 79.0, -90.0, *[1.0] * 8]
    for params in ({}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}):
        assert draw_many(logits, temperature=temperature, **params)[1] == DRAWS


def test_forbidden_tokens_never_come() -> None:
    bias = np.zeros((2, VOCAB), np.float32)
    bias[1, 3:] = -np.inf
    state = SamplerState(jnp.zeros((2, VOCAB), jnp.int32), jnp.asarray(bias))
    rows = np.zeros((DRAWS, VOCAB), np.float32)
    for params in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.01}, {"temperature": 0}):
        request = {"state_row": 1, **params}
        batch = make_batch([request], np.zeros(DRAWS, int), np.arange(DRAWS))
        output, _ = sample(rows, batch, state)
        assert np.asarray(output.token_ids).max() <= 2
        assert np.asarray(output.finite).all()


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * 3


def test_greedy_is_exact_and_takes_the_first_of_equals() -> None:
    logits = random_logits(6, 101)
    logits[2, [7, 50]] = logits[2].max() + 1
    logits[3] = np.nextafter(np.float32(5), 0)
    logits[3, 60] = 5
    requests = [{"temperature": 0.0, "top_k": 3, "top_p": 0.5}, {"temperature": 1.0}]
    output, _ = sample(logits, make_batch(requests, [0, 0, 0, 0, 0, 1]))
    tokens = np.asarray(output.token_ids)
    assert tokens[:5].tolist() == logits[:5].argmax(axis=1).tolist()
    assert tokens[2] == 7
    assert tokens[3] == 60


def test_draws_depend_on_seed_and_step_only() -> None:
    logits = random_logits(1, 997)[0]
    others = random_logits(5, 997, seed=1)
    mine = {"seed": -(2**63) + 5, "top_p": 0.95}
    for step in range(5):
        alone, _ = sample(logits[None], make_batch([mine], [0], [step]))
        for place in range(4):
            requests = [{"seed": s, "temperature": 0.5 * s, "top_k": s} for s in range(4)]
            requests[place] = mine
            rows = others.copy()
            rows[place + 1] = logits
            row_seq, row_step = [0, 0, 1, 2, 3], [9, 8, 7, 6, 5]
            row_seq[place + 1], row_step[place + 1] = place, step
            crowd, _ = sample(rows, make_batch(requests, row_seq, row_step))
            assert crowd.token_ids[place + 1] == alone.token_ids[0]


def test_each_word_of_the_seed_and_the_step_matter() -> None:
    logits = np.zeros((6, 50_000), np.float32)
    seeds = [0, 1, 2**32, -1, 2**63 - 1, 0]
    batch = make_batch([{"seed": seed} for seed in seeds], list(range(6)), [0, 0, 0, 0, 0, 1])
    assert len(set(np.asarray(sample(logits, batch)[0].token_ids).tolist())) == 6


def test_penalties_tell_prompt_from_output() -> None:
    logits = np.array([[2.0, 2.0, 2.0, -2.0, -2.0, -2.0]], np.float32)
    seen = np.zeros((2, 6), np.int32)
    seen[1] = [0, IN_PROMPT, 3, 0, IN_PROMPT, IN_PROMPT | 2]
    bias = np.zeros((2, 6), np.float32)
    bias[1] = [0, 0, 0, 0.5, 0, -1]
    adjusted = reference.adjust(jnp.asarray(logits[0]), seen[1], bias[1], 1.5, 0.25, 0.7)
    repeated = [2, 2 / 1.5, 2 / 1.5, -2, -2 * 1.5, -2 * 1.5]
    presence = np.array([0, 0, 0.7, 0, 0, 0.7])
    frequency = np.array([0, 0, 0.75, 0, 0, 0.5])
    expected = np.array(repeated) - presence - frequency + bias[1]
    np.testing.assert_allclose(adjusted, expected, rtol=1e-6)


def test_penalties_come_before_temperature() -> None:
    # 2 - 1 = 1 for the seen token, then both divided by 0.5: odds exp(2), not exp(3).
    seen = np.zeros((2, VOCAB), np.int32)
    seen[0, 0] = 1
    state = SamplerState(jnp.asarray(seen), jnp.zeros((2, VOCAB)))
    request = {"temperature": 0.5, "presence_penalty": 1.0, "state_row": 0}
    rows = np.tile(np.array([2.0, 2.0, *[-90.0] * 10], np.float32), (DRAWS, 1))
    batch = make_batch([request], np.zeros(DRAWS, int), np.arange(DRAWS))
    counts = np.bincount(np.asarray(sample(rows, batch, state)[0].token_ids), minlength=VOCAB)
    check_distribution(counts, expected_distribution([1.0, 2.0, *[-90.0] * 10], temperature=0.5))


def test_only_draws_are_counted_and_only_in_their_own_row() -> None:
    rng = np.random.default_rng(3)
    seen, bias = rng.integers(0, 5, (4, VOCAB)), rng.normal(size=(4, VOCAB))
    state = SamplerState(jnp.asarray(seen, jnp.int32), jnp.asarray(bias, jnp.float32))
    requests = [{"temperature": 0.0, "state_row": 2}, {"temperature": 0.0}, {"state_row": 0}]
    logits = random_logits(5)
    # The first request has a draw and a prompt position, the last row is padding.
    batch = make_batch(requests, [0, 0, 1, 2, 0], row_target=[4, -1, -1, -1, 0])
    output, after = sample(logits, batch, state)
    expected = seen.copy()
    expected[2, int(output.token_ids[1])] += 1
    expected[0, int(output.token_ids[3])] += 1
    assert np.asarray(after.seen).tolist() == expected.tolist()
    np.testing.assert_array_equal(after.bias, state.bias)


def test_requests_without_adjustments_ignore_the_state() -> None:
    logits = random_logits(2)
    bias = jnp.full((2, VOCAB), -jnp.inf).at[:, 0].set(0)
    state = SamplerState(jnp.zeros((2, VOCAB), jnp.int32), bias)
    requests = [{"temperature": 0.0, "state_row": 0}, {"temperature": 0.0, "state_row": -1}]
    output, _ = sample(logits, make_batch(requests, [0, 1]), state)
    assert output.token_ids.tolist() == [0, logits[1].argmax()]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4, 200)
    seen = jnp.full((2, 200), 3, jnp.int32)
    state = SamplerState(seen, jnp.asarray(random_logits(2, 200, seed=5)))
    adjusting = {"state_row": 1, "frequency_penalty": 1.0, "repetition_penalty": 1.3, "top_k": 4}
    requests = [adjusting, {"temperature": 0.3}]
    target = [17, -1, -1, 3]
    batch = make_batch(requests, [0, 0, 1, 1], row_target=target, want_logprobs=True)
    output, _ = sample(logits, batch, state, max_logprobs=7)
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for row in range(4):
        token = target[row] if target[row] >= 0 else int(output.token_ids[row])
        assert float(output.logprob[row]) == pytest.approx(exact[row, token], abs=1e-5)
        assert int(output.rank[row]) == 1 + (logits[row] > logits[row, token]).sum()
        best = np.argsort(-exact[row], kind="stable")[:7]
        assert output.top_token_ids[row].tolist() == best.tolist()
        np.testing.assert_allclose(output.top_logprobs[row], exact[row, best], atol=1e-5)


def test_more_logprobs_than_tokens_are_padded() -> None:
    batch = make_batch([{}], [0], want_logprobs=True)
    output, _ = sample(random_logits(1, 5), batch, max_logprobs=8)
    assert output.top_token_ids.shape == (1, 8)


def test_nothing_is_reported_unless_wanted() -> None:
    output, _ = sample(random_logits(2), make_batch([{}], [0, 0]), max_logprobs=3)
    for field in (output.logprob, output.rank, output.top_token_ids, output.top_logprobs):
        assert not np.asarray(field).any()


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_damaged_rows_are_flagged_alone(damage: float) -> None:
    logits = random_logits(3)
    good, _ = sample(logits, make_batch([{"seed": 4}], [0, 0, 0], [1, 2, 3]))
    logits[1, 5] = damage
    output, _ = sample(logits, make_batch([{"seed": 4}], [0, 0, 0], [1, 2, 3]))
    assert output.finite.tolist() == [True, False, True]
    assert output.token_ids[0] == good.token_ids[0]
    assert output.token_ids[2] == good.token_ids[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_any_allowed_token_is_flagged(temperature: float) -> None:
    bias = jnp.zeros((2, VOCAB)).at[1].set(-jnp.inf)
    state = SamplerState(jnp.zeros((2, VOCAB), jnp.int32), bias)
    requests = [{"state_row": row, "temperature": temperature} for row in (0, 1, -1)]
    # The last row is a prompt position: the state may still be that of somebody else.
    batch = make_batch(requests, [0, 1, 2, 1], row_target=[-1, -1, -1, 0])
    output, _ = sample(random_logits(4), batch, state)
    assert output.finite.tolist() == [True, False, True, True]


def test_penalties_that_overflow_are_flagged() -> None:
    state = SamplerState(jnp.ones((2, VOCAB), jnp.int32), jnp.zeros((2, VOCAB)))
    requests = [{"state_row": 0, "repetition_penalty": 1e-38}, {"state_row": 1}]
    output, _ = sample(np.full((2, VOCAB), 50.0), make_batch(requests, [0, 1]), state)
    assert output.finite.tolist() == [False, True]


def test_setting_a_row_leaves_the_others() -> None:
    state = SamplerState(jnp.ones((3, 4), jnp.int32), jnp.ones((3, 4)))
    seen, bias = jnp.arange(4, dtype=jnp.int32), jnp.arange(4.0) - 2
    after = jax.jit(sampler.set_row)(state, jnp.int32(1), seen, bias)
    assert after.seen.tolist() == [[1] * 4, [0, 1, 2, 3], [1] * 4]
    assert after.bias.tolist() == [[1] * 4, [-2, -1, 0, 1], [1] * 4]


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}]
)
@pytest.mark.parametrize("drafted", [0, 3, 9])
def test_drafts_do_not_change_the_distribution(params: dict[str, Any], drafted: int) -> None:
    """A draft is accepted with its probability, and what is drawn in its place is the residual."""
    second = LOGITS[::-1]
    chains = np.tile(np.array([LOGITS, second], np.float32), (DRAWS, 1))
    batch = make_batch([params], np.zeros(2 * DRAWS, int), np.arange(2 * DRAWS))
    draft = np.tile(np.array([drafted, -1], np.int32), DRAWS)
    batch = dataclasses.replace(batch, row_draft=jnp.asarray(draft))
    state = SamplerState.zeros(2, VOCAB)
    output, _ = jax.jit(sampler.sample, static_argnums=(3, 4))(
        jnp.asarray(chains), batch, state, 0, 1
    )
    first, bonus = np.asarray(output.token_ids).reshape(DRAWS, 2).T
    p = expected_distribution(LOGITS, **params)
    check_distribution(np.bincount(first, minlength=VOCAB), p)
    assert ((bonus >= 0) == (first == drafted)).all()
    accepted = np.bincount(bonus[bonus >= 0], minlength=VOCAB)
    assert accepted.sum() == pytest.approx(DRAWS * p[drafted], abs=5 * np.sqrt(DRAWS))
    if accepted.sum() > 500:
        check_distribution(accepted, expected_distribution(second, **params))


def test_penalties_count_accepted_drafts_alone() -> None:
    """A chain of three rows, of which the second draws another token than was drafted."""
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 4] = logits[1, 4] = logits[2, 7] = 5.0
    logits[1, 6] = 4.0
    batch = make_batch(
        [{"temperature": 0.0, "frequency_penalty": 2.0, "state_row": 1}], [0, 0, 0], [0, 1, 2]
    )
    batch = dataclasses.replace(batch, row_draft=jnp.asarray([4, 4, -1], jnp.int32))
    output, state = sampler.sample(
        jnp.asarray(logits), batch, SamplerState.zeros(2, VOCAB), 0, max_draft_len=2
    )
    assert output.token_ids.tolist() == [4, 6, -1]
    assert np.flatnonzero(state.seen[1]).tolist() == [4, 6]
    assert not state.seen[0].any()
