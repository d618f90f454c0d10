"""When drafts are made: what they gain on a scripted engine, and what they cost if they fail."""

import functools
import random
from collections.abc import Sequence

import pytest
from scripted_engine import Job, ScriptedEngine, Times

from arctic_jax.request import Request
from arctic_jax.spec_decode.acceptance import MIN_LENGTH, PATIENCE, Acceptance, Trust
from arctic_jax.spec_decode.allowance import SHARE, Allowance
from arctic_jax.spec_decode.draft import Draft
from arctic_jax.spec_decode.draft_costs import PRIOR, DraftCosts
from arctic_jax.spec_decode.suffix_proposer import SuffixProposer
from arctic_jax.speculative_config import SpeculativeConfig

VOCAB = 5000


def text(rng: random.Random, length: int) -> list[int]:
    """Words as frequent as in a language, which do not depend on each other."""
    return [int(VOCAB ** rng.random()) for _ in range(length)]


@functools.cache
def jobs_that(kind: str, count: int = 12, length: int = 256) -> list[Job]:
    """Answers that are `new`, or `quote` the prompt with edits, or `deceive` a suffix drafter.

    A deceiving answer repeats phrases of its prompt, and each time goes on otherwise.
    """
    rng, jobs = random.Random(kind), []
    for _ in range(count):
        prompt = text(rng, 200)
        answer: list[int] = []
        while len(answer) < length:
            if kind != "new":
                begin, size = rng.randrange(180), 40 if kind == "quote" else rng.randint(3, 6)
                answer += prompt[begin : begin + size]
            answer += text(rng, 5)
        jobs.append((prompt, answer[:length]))
    return jobs


# The host's time is what counts for small models, the device's for large ones.
TIMES = {
    "small model, 1 request": (1, Times(1.1e-3, 0.5e-3, 0.7e-3, look=20e-6)),
    "small model, 12 requests": (12, Times(1.9e-3, 0.8e-3, 1.2e-3, look=20e-6)),
    "large model, 1 request": (1, Times(1e-3, 10e-3, 10.5e-3, look=20e-6)),
    "large model, 12 requests": (12, Times(2e-3, 10e-3, 11e-3, look=20e-6)),
}


def speed(kind: str, where: str, **config: object) -> float:
    """Tokens a second as a share of those without speculation."""
    concurrency, times = TIMES[where]
    jobs = jobs_that(kind)
    plain = ScriptedEngine(times).run(jobs, concurrency)
    engine = ScriptedEngine(times, SpeculativeConfig("suffix", **config))
    return engine.run(jobs, concurrency) / plain


@pytest.mark.parametrize("where", TIMES)
@pytest.mark.parametrize("kind", ["new", "deceive"])
def test_short_runs_do_not_become_slower_where_drafts_fail(kind: str, where: str) -> None:
    assert speed(kind, where) > 0.98


@pytest.mark.parametrize("where", ["small model, 1 request", "small model, 12 requests"])
def test_there_drafts_always_made_would_cost_a_lot(where: str) -> None:
    """So the test above says something."""
    assert speed("new", where, adaptive=False) < 0.9
    assert speed("deceive", where, adaptive=False) < 0.97


@pytest.mark.parametrize("where", TIMES)
def test_where_drafts_succeed_they_gain_what_they_can(where: str) -> None:
    found, with_all = speed("quote", where), speed("quote", where, adaptive=False)
    assert found > 1.2
    assert found - 1 > 0.9 * (with_all - 1)


def device_speed(
    verify: float, draft: float, right: int, adaptive: bool = True, rounds: int = 1
) -> tuple[float, float]:
    """Tokens a round's time, and the share of rounds with drafts, of a speculator of 4 tokens.

    With several rounds the host takes twice as long to launch a step as the device for a round.
    """
    config = SpeculativeConfig("arctic", model="m", num_speculative_tokens=4, adaptive=adaptive)
    times = Times(2.0 if rounds > 1 else 0.0, 1.0, verify, draft=draft)
    engine = ScriptedEngine(times, config, num_right=right, num_rounds=rounds)
    # A trial is a step, and costs as many rounds as that has.
    found = engine.run([([1], range(2000 * rounds))], 1)
    return found, engine.num_drafts / engine.num_steps


@pytest.mark.parametrize("right", [0, 1, 2, 4])
@pytest.mark.parametrize("draft", [0.0, 0.02, 0.3, 2.0])
@pytest.mark.parametrize("verify", [1.02, 1.3, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("rounds", [1, 4])
def test_drafts_are_made_where_they_pay(
    verify: float, draft: float, right: int, rounds: int
) -> None:
    """Whatever it costs to make a draft and to verify it: as fast as without, and as with all."""
    found, share = device_speed(verify, draft, right, rounds=rounds)
    with_all, _ = device_speed(verify, draft, right, adaptive=False, rounds=rounds)
    assert found > 0.98 * max(1.0, with_all)
    if with_all > 1.1:
        assert share > 0.9
    if with_all < 0.9:
        assert share < 0.1


def test_while_nobody_hopes_nobody_looks_often() -> None:
    """What the proposer is asked for in a run of new text: little, and nothing at most steps."""
    concurrency, times = TIMES["small model, 12 requests"]
    engine = ScriptedEngine(times, SpeculativeConfig("suffix"))
    assert isinstance(engine.proposer, SuffixProposer)
    batches: list[int] = []
    drafts = engine.proposer.drafts

    def counted(requests: Sequence[Request], limits: Sequence[int]) -> Sequence[Draft]:
        batches.append(len(requests))
        return drafts(requests, limits)

    engine.proposer.drafts = counted
    engine.run(jobs_that("new"), concurrency)
    assert len(batches) < engine.num_steps / 2
    assert sum(batches) * times.look < 2 * SHARE * engine.now
    assert sum(batches) > 12 * PATIENCE


def test_lengths_follow_success() -> None:
    acceptance = Acceptance(max_length=16)
    acceptance.learn(16, expected=8.0, accepted=4)
    assert acceptance.length == 5
    acceptance.learn(5, expected=2.0, accepted=5)
    assert acceptance.length == 10
    acceptance.learn(10, expected=3.0, accepted=0)
    assert acceptance.length == MIN_LENGTH
    for _ in range(5):
        acceptance.learn(4, expected=1.0, accepted=4)
    assert acceptance.length == 16


def test_trust_comes_from_others_first_then_from_what_was_right() -> None:
    trust = Trust()
    assert trust.value(0.3) == pytest.approx(0.3)
    for _ in range(50):
        trust.add(accepted=1, expected=4.0)
    assert trust.value(1.0) == pytest.approx(0.25, abs=0.05)
    for _ in range(50):
        trust.add(accepted=8, expected=4.0)
    assert trust.value(1.0) == pytest.approx(2.0, abs=0.2)


def test_debts_are_worked_off_and_forgiven_when_drafts_become_good() -> None:
    acceptance = Acceptance(max_length=16)
    begin = acceptance.balance
    acceptance.book(-4.0)
    acceptance.earn(100)
    assert begin - 4.0 < acceptance.balance < 0
    acceptance.book_missed(-1.0)
    low = acceptance.balance
    acceptance.book_missed(2.0)
    assert low < acceptance.balance < low + 2.0
    acceptance.book_missed(100.0)
    assert acceptance.balance == begin  # what was never made is no gain
    acceptance.book(3.0)
    acceptance.book_missed(-100.0)
    assert acceptance.balance == begin + 3.0


def test_an_allowance_grows_with_time_and_gains_and_forgets_large_debts() -> None:
    allowance = Allowance(share_of_gains=0.1)
    begin = allowance.steps
    allowance.earn(100.0, 0.0)
    assert allowance.steps == pytest.approx(begin + 100 * SHARE)
    allowance.spend(1e6)
    low = allowance.steps
    allowance.earn(1.0, 1e6)
    assert low < 0 < allowance.steps < 10


def test_costs_are_the_tokens_that_all_lose_around_drafts() -> None:
    """Of 8 requests one drafts: it misses two steps, and all wait half a step for the third."""
    now = 0.0
    costs = DraftCosts(lambda: now)
    assert costs.plain(8) == 0.0
    assert costs.of_portion(8) == PRIOR

    def step(seconds: float, num_sampled: int = 8, num_drafts: int = 0) -> None:
        nonlocal now
        now += seconds
        costs.took(8, num_sampled, num_drafts, mixed=False)

    for _ in range(5):
        step(1.0)
    assert costs.plain(8) == pytest.approx(1.0)
    for _ in range(40):
        costs.made(8, num_drafts=1, num_begun=1)
        step(1.0, num_sampled=7)
        step(1.5, num_drafts=1)
        step(1.0, num_sampled=7)
        for _ in range(5):
            step(1.0)
    assert costs.known(8)
    assert costs.of_portion(8) == pytest.approx((2 + 8 * 0.5) / 2, rel=0.1)
    assert costs.of_portion(1) == PRIOR
    for _ in range(5000):
        step(1.0)
    assert not costs.known(8)


def test_times_of_steps_with_prompts_and_of_pauses_are_no_costs() -> None:
    now = 0.0
    costs = DraftCosts(lambda: now)
    for _ in range(5):
        now += 1.0
        costs.took(4, 4, 0, mixed=False)
    now += 100.0
    assert costs.took(4, 4, 0, mixed=True) == 1.0
    costs.pause()
    now += 1000.0
    assert costs.took(4, 4, 0, mixed=False) == 1.0
    assert costs.plain(4) == pytest.approx(1.0)


def test_with_prompts_in_all_steps_those_are_what_drafts_are_compared_with() -> None:
    now = 0.0
    costs = DraftCosts(lambda: now)
    for _ in range(20):
        now += 2.0
        costs.took(4, 4, 0, mixed=True)
    assert costs.plain(4) == pytest.approx(2.0)
