"""Proposers without an engine: what they draft, for whom, and when they stop."""

from collections.abc import Sequence

import numpy as np
import pytest

from arctic_jax.batch import HostOutput
from arctic_jax.request import Request, RequestStatus, SamplingParams
from arctic_jax.scheduled_batch import ScheduledBatch, ScheduledRequest
from arctic_jax.spec_decode.device_proposer import DeviceProposer
from arctic_jax.spec_decode.draft_costs import DraftCosts
from arctic_jax.spec_decode.hybrid_proposer import HybridProposer
from arctic_jax.spec_decode.ngram_proposer import NgramProposer
from arctic_jax.spec_decode.proposer import NoProposer, Proposer, build_proposer
from arctic_jax.spec_decode.suffix_proposer import SuffixProposer
from arctic_jax.speculative_config import SpeculativeConfig


def request_of(
    prompt: Sequence[int], output: Sequence[int], salt: str | None = None, **params: object
) -> Request:
    """A request that runs, and for which a step has just drawn the last token of `output`."""
    request = Request(
        "r", 0, list(prompt), SamplingParams(**params), max_tokens=100, cache_salt=salt
    )
    request.status = RequestStatus.RUNNING
    extend(request, output)
    return request


def output_of(drafts: Sequence[Sequence[int]]) -> HostOutput:
    empty = np.zeros((0, 0))
    return HostOutput(empty, empty, empty, empty, empty, empty, np.array(drafts or empty, int))


def extend(request: Request, tokens: Sequence[int]) -> None:
    for token in tokens:
        request.expect_tokens()
        request.take_token(token)


def propose(
    proposer: Proposer,
    *requests: Request,
    drafted: int = 0,
    accepted: int = 0,
    drafts: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """What each drafts after a step; `drafts`: those that the device made in it."""
    rows, rounds = 1 + drafted, [accepted]
    parts = [
        ScheduledRequest(r, 0, rows, rows, True, drafted, accepted_of_rounds=rounds)
        for r in requests
    ]
    proposer.propose(ScheduledBatch(tuple(parts), bool(drafts)), output_of(drafts))
    return [list(request.draft) for request in requests]


def suffix(**settings: object) -> SuffixProposer:
    return SuffixProposer(SpeculativeConfig("suffix", adaptive=False, **settings))


def ngram(**settings: object) -> NgramProposer:
    lengths = {"prompt_lookup_min": 2, "prompt_lookup_max": 3}
    return NgramProposer(SpeculativeConfig("ngram", adaptive=False, **(lengths | settings)))


def test_the_method_chooses_the_proposer() -> None:
    assert isinstance(build_proposer(SpeculativeConfig()), NoProposer)
    assert isinstance(build_proposer(SpeculativeConfig("suffix")), SuffixProposer)
    assert isinstance(build_proposer(SpeculativeConfig("ngram")), NgramProposer)
    assert type(speculator()) is DeviceProposer
    assert type(speculator(enable_suffix_decoding=True)) is HybridProposer


@pytest.mark.parametrize(("make", "draft"), [(suffix, [4, 5, 6]), (ngram, [4, 5, 6, 7])])
def test_drafts_go_on_as_the_request_did_before(make, draft: list[int]) -> None:
    request = request_of([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], [3])
    assert propose(make(), request) == [draft]


def test_trees_hold_several_continuations() -> None:
    said = [1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2]
    wide = {"suffix_max_spec_offset": 5.0, "suffix_min_token_prob": 0.01}
    request = request_of(said, [3])
    propose(suffix(suffix_use_tree_spec=True, **wide), request)
    parents = list(request.draft_parents)
    after = {t for t, p in zip(request.draft, parents, strict=True) if p == -1}
    assert after == {4, 5}
    assert request.draft[:2] in ([4, 9], [5, 8])
    assert propose(suffix(**wide), request)[0][:1] in ([4], [5])
    assert not request.draft_parents  # the tree is forgotten with its draft


def test_a_hybrid_takes_the_tree_or_the_networks_path() -> None:
    said = [1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2]
    wide = {"suffix_max_spec_offset": 9.0, "suffix_min_token_prob": 0.01}
    for length, is_tree in ((1, True), (8, False)):
        proposer = speculator(
            enable_suffix_decoding=True,
            suffix_use_tree_spec=True,
            num_speculative_tokens=length,
            **wide,
        )
        request = request_of(said, [3])
        propose(proposer, request, drafts=[[7] * length])
        assert bool(request.draft_parents) == is_tree
        assert is_tree or request.draft == [7] * length


def test_ngram_takes_the_longest_and_the_latest_match() -> None:
    proposer = ngram(num_speculative_tokens=2)
    # 7 8 came before 1, and later before 2; 9 7 8 only before 1.
    request = request_of([9, 7, 8, 1, 5, 7, 8, 2, 6, 7], [8])
    assert propose(proposer, request) == [[2, 6]]
    extend(request, [3, 9, 7, 8])
    assert propose(proposer, request) == [[1, 5]]
    extend(request, [90])
    assert propose(proposer, request) == [[]]


def test_answers_to_others_make_drafts_unless_salts_differ() -> None:
    proposer = suffix()
    first = request_of([50, 51], [10, 11, 12, 13, 14, 15])
    propose(proposer, first)
    proposer.finish(first)
    same, other = request_of([60], [10, 11, 12]), request_of([60], [10, 11, 12], salt="tenant")
    assert propose(proposer, same, other) == [[13, 14, 15], []]


def test_the_global_tree_can_be_switched_off() -> None:
    proposer = suffix(suffix_cache_max_requests=0)
    first = request_of([50, 51], [10, 11, 12, 13, 14, 15])
    propose(proposer, first)
    assert propose(proposer, request_of([60], [10, 11, 12])) == [[]]


def speculator(**settings: object) -> Proposer:
    given = {"model": "m", "num_speculative_tokens": 3, "adaptive": False}
    return build_proposer(SpeculativeConfig("arctic", **(given | settings)))


def test_a_speculators_drafts_are_those_of_the_device() -> None:
    proposer = speculator()
    requests = [request_of([1, 2], [i]) for i in range(3)]
    waiting = request_of([1, 2], [])
    requests.insert(1, waiting)
    made = [[i, i + 1, i + 2] for i in range(0, 40, 10)] + [[0, 0, 0]] * 4
    wanted = [[0, 1, 2], [], [20, 21, 22], [30, 31, 32]]
    assert propose(proposer, *requests, drafts=made) == wanted
    requests[0].max_tokens = 3  # room for one draft and the token after it
    assert propose(proposer, requests[0], drafts=made) == [[0]]
    # Two were wrong: there are three again.
    assert propose(proposer, requests[2], drafted=3, accepted=1, drafts=made) == [[0, 1, 2]]
    assert proposer.stats.accepted.tolist() == [1, 0, 0]


def test_a_speculator_drafts_for_the_first_of_a_large_batch_and_in_a_larger_for_nobody() -> None:
    proposer = speculator(disable_by_batch_size=2, hard_disable_by_batch_size=4)
    requests = [request_of([1, 2], [3]) for _ in range(4)]
    made = [[7, 8, 9]] * 8
    assert [bool(d) for d in propose(proposer, *requests[:3], drafts=made)] == [True, True, False]
    assert not any(propose(proposer, *requests, drafts=made))


def test_the_hybrid_takes_the_suffix_draft_if_its_score_reaches_three() -> None:
    """Said once before, a token has probability 1/2: six of them have a score of exactly 3."""
    made = [[90, 91, 92]]
    for count, matched in ((5, False), (6, True)):
        proposer = speculator(enable_suffix_decoding=True)
        request = request_of(list(range(1, 16)), range(1, count + 1))
        wanted = [*range(count + 1, 2 * count + 1)] if matched else made[0]
        assert propose(proposer, request, drafts=made) == [wanted]
        assert [bool(request.draft), len(request.draft)] == [True, len(wanted)]


def test_the_hybrids_soft_cut_off_is_the_speculators_alone() -> None:
    settings = {"disable_by_batch_size": 1, "hard_disable_by_batch_size": 4}
    proposer = speculator(enable_suffix_decoding=True, **settings)
    plain, other = request_of([1, 2], [3]), request_of([4, 5], [6])
    sure = request_of(list(range(1, 16)), range(1, 9))
    made = [[90, 91, 92]] * 3
    drafts = propose(proposer, plain, other, sure, drafts=made)
    assert drafts == [made[0], [], [*range(9, 16), 1][: len(drafts[2])]]
    assert len(drafts[2]) >= 6
    assert not any(propose(proposer, plain, other, sure, request_of([9], [9]), drafts=made))


REPEATING = [1, 2, 3, 4, 5, 6, 7, 8] * 2


def test_of_a_large_batch_the_first_ones_draft_and_of_a_larger_nobody() -> None:
    proposer = ngram(disable_by_batch_size=2, hard_disable_by_batch_size=4)
    requests = [request_of(REPEATING, [1, 2, 3]) for _ in range(4)]
    assert [bool(d) for d in propose(proposer, *requests[:3])] == [True, True, False]
    assert not any(propose(proposer, *requests))
    proposer.finish(requests[0])
    assert [bool(d) for d in propose(proposer, *requests[1:])] == [True, True, False]


def test_drafts_leave_room_for_the_token_that_follows() -> None:
    request = request_of(REPEATING, [1, 2, 3])
    for room, length in ((1, 0), (2, 1), (3, 2)):
        request.max_tokens = len(request.output_token_ids) + room
        assert len(propose(ngram(), request)[0]) == length


def test_what_the_host_forbids_is_the_same_for_all_tokens_of_a_draft() -> None:
    for min_tokens, length in ((5, 1), (4, 0), (3, 4), (0, 4)):
        request = request_of(REPEATING, [1, 2, 3], min_tokens=min_tokens, max_tokens=99)
        assert len(propose(ngram(), request)[0]) == length
    request.bad_words_ids = ((5, 6),)
    assert propose(ngram(), request) == [[]]


def test_what_a_draft_would_have_brought_is_learnt_without_making_it() -> None:
    """Of two that are not allowed to draft: one goes on as it did before, one does not."""
    proposer = NgramProposer(SpeculativeConfig("ngram", prompt_lookup_max=2))
    now = 0.0
    proposer.costs = DraftCosts(lambda: now)
    same, other = (request_of(REPEATING, [1, 2, 3]) for _ in range(2))
    for i in range(24):
        now += 1.0
        proposer._for_steps.spend(10.0)
        assert propose(proposer, same, other) == [[], []]
        extend(same, [1 + (3 + i) % 8])
        extend(other, [(90 + i, 1, 2)[i % 3]])  # 1 2 goes on otherwise each time
    trust = [proposer._progress[r].acceptance.trust.value() for r in (same, other)]
    assert trust[0] > 0.9
    assert trust[1] < 0.7
    assert proposer.stats.num_drafts == 0
    proposer._for_steps.earn(1000.0, 0.0)
    drafts = propose(proposer, same, other)
    assert drafts[0]
    assert not drafts[1]


def test_what_was_said_by_those_who_never_looked_is_there_for_others() -> None:
    proposer = SuffixProposer(SpeculativeConfig("suffix"))
    proposer._for_looks.spend(10.0)
    first = request_of([50, 51], [10, 11, 12])
    propose(proposer, first)
    assert not proposer.cache.active_requests
    extend(first, [13, 14, 15])
    proposer.finish(first)
    assert len(proposer.cache.cached_requests) == 1
    others = suffix()
    others.cache = proposer.cache
    others._counter = proposer._counter
    assert propose(others, request_of([60], [10, 11, 12])) == [[13, 14, 15]]


def test_one_that_waits_for_a_token_drafts_past_it() -> None:
    request = request_of(REPEATING, [1, 2, 3])
    request.expect_tokens()
    assert propose(ngram(), request) == [[4, 5, 6, 7]]
    assert request.waits_for_tokens


def test_finished_and_waiting_requests_do_not_draft() -> None:
    proposer = ngram()
    waiting, finished = request_of(REPEATING, [1, 2, 3]), request_of(REPEATING, [1, 2, 3])
    waiting.status, finished.status = RequestStatus.WAITING, RequestStatus.STOPPED
    assert propose(proposer, waiting, finished) == [[], []]
    proposer.finish(finished)  # it was never started
