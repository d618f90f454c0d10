"""Suffix decoding: trees against plain ones, drafts against the definition and the original's."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_suffix_tree import PlainTree, compiled_versions, continuations, expanded, used

from arctic_jax.spec_decode import SuffixDecodingCache, SuffixDecodingDraft, SuffixTree
from arctic_jax.spec_decode.suffix_forest import SuffixForest

NOT_COMPILED_AGAIN = [1] * 7


class Both:
    """One tree in arrays and a plain one, compared after every change."""

    def __init__(self, max_depth):
        self.tree, self.plain = SuffixTree(max_depth), PlainTree(max_depth)

    def append(self, sequence, token):
        self.tree.append(sequence, token)
        self.plain.append(sequence, token)
        self.compare()

    def remove(self, sequence):
        self.tree.remove(sequence)
        self.plain.remove(sequence)
        self.compare()

    def compare(self):
        assert expanded(self.tree._forest, self.tree._root) == self.plain.root.as_tuple()

    def draft(self, context, *arguments):
        token_ids, probs, score, match_len = self.plain.speculate(context, *arguments)
        draft = self.tree.speculate(context, *arguments)
        parents = list(range(-1, len(token_ids) - 1))
        assert draft == SuffixDecodingDraft(token_ids, parents, probs, score, match_len)

    def draft_tree(self, context, *arguments):
        probs, score, match_len = self.plain.speculate_tree(context, *arguments)
        draft = self.tree.speculate(context, *arguments, use_tree_spec=True)
        assert (draft.probs, draft.score, draft.match_len) == (probs, score, match_len)
        if not draft.token_ids:
            return
        start, min_prob = self.plain.match(context[-match_len:]), np.float32(arguments[-1])
        known = paths(start, min_prob, np.float32(1))
        for i, prob in enumerate(draft.probs):
            assert known.pop(path_to(draft, i)) == prob


def path_to(draft, i):
    """The tokens that lead to one of a draft's tokens, and that."""
    if i < 0:
        return ()
    assert draft.parents[i] < i
    return (*path_to(draft, draft.parents[i]), draft.token_ids[i])


def paths(node, min_prob, prob, before=()):
    """All paths below a node of a plain tree, with their probabilities."""
    found = {}
    for child in node.children:
        below = prob
        if child.count != node.count:
            below = prob * np.float32(child.count) / np.float32(node.count)
        if below >= min_prob:
            found[(*before, child.token)] = below
            found |= paths(child, min_prob, below, (*before, child.token))
    return found


tokens = st.integers(0, 2)
appends = st.tuples(st.integers(0, 3), st.lists(tokens, min_size=1, max_size=6))
removals = st.tuples(st.integers(0, 3), st.none())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.lists(appends | removals, max_size=20))
def test_the_tree_is_the_plain_one_after_every_append_and_remove(max_depth, changes):
    both = Both(max_depth)
    for sequence, new in changes:
        if new is not None:
            for token in new:
                both.append(sequence, token)
        elif sequence in both.plain.sequences:
            both.remove(sequence)
    for sequence in list(both.plain.sequences):
        both.remove(sequence)
    assert used(both.tree._forest) == {"node": 1, "group": 0, "page": 0, "sequence": 0}


@settings(max_examples=80, deadline=None)
@given(
    max_depth=st.integers(1, 9),
    texts=st.lists(st.lists(tokens, max_size=40), min_size=1, max_size=3),
    context=st.lists(tokens, max_size=12),
    limit=st.integers(0, 12),
    factor=st.sampled_from([0.0, 0.3, 1.0, 2.5, -1.0]),
    offset=st.sampled_from([0.0, 1.0, 4.0, -0.5, -2.0]),
    min_prob=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
)
def test_drafts_are_those_of_the_definition(
    max_depth, texts, context, limit, factor, offset, min_prob
):
    both = Both(max_depth)
    for sequence, text in enumerate(texts):
        both.tree.extend(sequence, text)
        for token in text:
            both.plain.append(sequence, token)
    for end in (context, texts[0]):
        both.draft(end, limit, factor, offset, min_prob)
        both.draft_tree(end, limit, factor, offset, min_prob)


@pytest.mark.parametrize("max_depth", [1, 2, 31, 32, 33, 40])
def test_sequences_of_many_pages(max_depth):
    """Edges read tokens across the border of two pages, before and after removals."""
    rng = random.Random(max_depth)
    both = Both(max_depth)
    texts = [[rng.randrange(2) for _ in range(140)] for _ in range(2)]
    texts.append(texts[0][10:130] + texts[1][:20])  # shares most of the first
    for sequence, text in enumerate(texts):
        both.tree.extend(sequence, text)
        for token in text:
            both.plain.append(sequence, token)
    both.compare()
    both.remove(0)  # whose tokens most edges read
    both.draft(texts[2][:80], 64, 1.0, 0.0, 0.0)
    both.remove(2)
    both.draft(texts[1][:80], 64, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize(
    "text", [[0] * 20, [0, 1] * 10, [7, 0, -1, 2**31 - 1, 7, 0, -(2**31)]], ids=["a", "ab", "ids"]
)
def test_equal_sequences_are_removed_in_any_order(order, text):
    both = Both(5)
    for sequence in range(3):
        for token in text:
            both.append(sequence, token)
    for sequence in order:
        both.remove(sequence)
    assert both.tree.num_seqs == 0


def test_a_sequence_that_grows_survives_the_removal_of_its_double():
    both = Both(4)
    for token in [1, 2, 3, 1, 2]:
        both.append(0, token)
        both.append(1, token)
    both.remove(0)
    for token in [3, 1, 4]:
        both.append(1, token)
    both.draft([1, 2, 3, 1], 8, 1.0, 0.0, 0.0)


def test_pools_grow_and_are_used_again():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 40, 3000, np.int32)
    both = Both(16)
    both.tree.extend(0, text)
    for token in text.tolist():
        both.plain.append(0, token)
    assert len(both.tree._forest.arrays.nodes) > 2048
    both.compare()
    before, arrays = used(both.tree._forest), both.tree.nbytes
    for _ in range(3):
        both.tree.extend(1, text[:500])
        both.tree.remove(1)
    assert used(both.tree._forest) == before
    assert both.tree.nbytes == arrays
    for start in (100, 2000):
        both.draft(text[start : start + 16].tolist(), 16, 1.0, 0.0, 0.0)


def test_memory_is_linear_in_the_tokens():
    """At most two nodes for a suffix, whatever the depth."""
    rng = np.random.default_rng(1)
    for depth, kinds in ((64, 2), (64, 1000), (8, 4)):
        tree = SuffixTree(depth)
        tree.extend(0, rng.integers(0, kinds, 5000, np.int32))
        assert used(tree._forest)["node"] <= 2 * 5000
        assert used(tree._forest)["group"] < used(tree._forest)["node"]
    # 64 bytes a node, 28 a token, and as much again that was reserved
    assert tree.nbytes <= 2 * 5000 * (2 * 64 + 28)


# --- drafts of the original (arctic_inference 0.3.0), recorded


def test_the_example_of_one_earlier_occurrence():
    """A continuation seen once has probability 1/2: the suffix that ends now counts as well."""
    cache = SuffixDecodingCache(64, 0)
    context = [*range(1, 16), *range(1, 7)]
    cache.start_request("r", context)
    assert cache.speculate("r", context, 64) == SuffixDecodingDraft(
        list(range(7, 13)), list(range(-1, 5)), [0.5] * 6, 3.0, 6
    )
    draft = cache.speculate("r", context, 64, max_spec_offset=1.0)
    assert (draft.token_ids, draft.score) == (list(range(7, 14)), 3.5)


def test_a_recorded_path_and_tree():
    text = [t for k in range(7) for t in (1, 2, 100 + k)]
    text += [t for k in range(2) for t in (1, 3, 200 + k)] + [5, 1]
    cache = SuffixDecodingCache(64, 0)
    cache.start_request(0, text)
    seven, two, one = (float(np.float32(p)) for p in (0.7, 0.2, 0.1))
    path = cache.speculate(0, [9, 1], 9, 1.0, 9.0, 0.0)
    assert path.token_ids == [2, 100, 1, 2, 101, 1, 2, 102, 1]
    assert path.probs == [seven, *[one] * 8]
    assert path.score == 1.5000001192092896
    tree = cache.speculate(0, [9, 1], 9, 1.0, 9.0, 0.0, True)
    assert tree.token_ids == [2, 3, 105, 106, 102, 201, 1, 1, 1]
    assert tree.parents == [-1, -1, 0, 0, 0, 1, 2, 3, 4]
    assert tree.probs == [seven, two, *[one] * 7]
    assert tree.score == 1.6000001430511475


def test_equal_probabilities_come_in_the_recorded_order():
    text = [t for k in (2, 3, 4, 5) for t in (1, k, 50 + k, 60 + k)] + [1]
    cache = SuffixDecodingCache(64, 0)
    cache.start_request(0, text)
    draft = cache.speculate(0, [9, 1], 20, 1.0, 20.0, 0.0, True)
    assert draft.token_ids == [
        2, 4, 5, 52, 54, 55, 62, 64, 65, 1, 1, 1, 3, 5, 53, 3, 55, 63, 53, 65
    ]  # fmt: skip
    assert draft.parents == [
        -1, -1, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, -1, 13, 14, 15, 16
    ]  # fmt: skip
    assert draft.score == 4.000000476837158


@pytest.mark.parametrize(
    ("factor", "offset", "lengths"),
    [
        (0.7, 0.0, [0, 1, 2, 2, 3, 4, 4, 5, 6, 7]),
        (1 / 3, 0.0, [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),
        (0.1, 0.9, [1] * 10),
        (0.0, 2.9999995, [3] * 10),
        (0.0, 2.99999, [2] * 10),
        (-1.0, 5.0, [4] * 10),
        (2.5, 0.0, [2, 5, 7, 10, 12, 15, 17, 20, 22, 25]),
    ],
)
def test_recorded_lengths(factor, offset, lengths):
    """One draft for each length of the match; with a factor below 0 shorter ones have more room."""
    cache = SuffixDecodingCache(64, 0)
    text = [*range(100), *range(100), *range(30)]
    cache.start_request(0, text)
    drafts = [
        cache.speculate(0, text[-m - 1 :], 64, factor, offset, 0.0)
        for m in range(1, len(lengths) + 1)
    ]
    assert [len(draft.token_ids) for draft in drafts] == lengths


@pytest.mark.parametrize(
    ("min_prob", "path", "tree"), [(0.7, [2], [2]), (0.7000001, [], []), (1.1, [], [])]
)
def test_probabilities_are_compared_as_float32(min_prob, path, tree):
    cache = SuffixDecodingCache(64, 0)
    text = [t for k in range(7) for t in (1, 2, 100 + k)]
    text += [t for k in range(2) for t in (1, 3, 200 + k)] + [5, 1]
    cache.start_request(0, text)
    assert cache.speculate(0, [9, 1], 3, 1.0, 3.0, min_prob).token_ids == path
    assert cache.speculate(0, [9, 1], 3, 1.0, 3.0, min_prob, True).token_ids == tree


# --- the cache


@pytest.mark.parametrize("use_tree_spec", [False, True])
@pytest.mark.parametrize("limit", [-1, 0, 1, 3])
def test_the_cache_drafts_as_plain_trees_do(limit, use_tree_spec):
    """Requests of two tenants come, go and are evicted; each draft by single call and by batch."""
    rng = random.Random(limit)
    cache = SuffixDecodingCache(8, limit)
    local, shared, texts, salts, cached = {}, {}, {}, {}, []
    words = [[rng.randrange(3) for _ in range(9)] for _ in range(4)]
    arguments = (6, 1.0, 1.0, 0.1)

    def plain_draft(req_id, context):
        find = PlainTree.speculate_tree if use_tree_spec else PlainTree.speculate
        mine = find(local[req_id], context, *arguments)
        others = find(shared.setdefault(salts[req_id], PlainTree(8)), context, *arguments)
        return mine[-2:] if mine[-2] >= others[-2] else others[-2:]

    def evict(req_id, salt):
        cached.remove((req_id, salt))
        if req_id in shared.get(salt, PlainTree(8)).sequences:
            shared[salt].remove(req_id)

    won = 0
    for _ in range(150):
        req_id = rng.randrange(5)
        if req_id not in texts:
            for entry in [entry for entry in cached if entry[0] == req_id]:
                evict(*entry)
            salts[req_id], texts[req_id] = rng.choice(["a", None]), rng.choice(words)[:]
            cache.start_request(req_id, texts[req_id], cache_salt=salts[req_id])
            local[req_id] = PlainTree(8)
            for token in texts[req_id]:
                local[req_id].append(0, token)
            if limit:
                cached.append((req_id, salts[req_id]))
                while len(cached) > limit > 0:
                    evict(*cached[0])
        elif rng.random() < 0.15:
            cache.stop_request(req_id)
            del texts[req_id], local[req_id]
        else:
            new = rng.choice(words)[: rng.randrange(1, 6)]
            cache.add_active_responses({req_id: new})
            texts[req_id] += new
            for token in new:
                local[req_id].append(0, token)
                if (req_id, salts[req_id]) in cached:
                    shared.setdefault(salts[req_id], PlainTree(8)).append(req_id, token)
        assert list(cache.cached_requests) == [entry[0] for entry in cached]
        assert list(cache.active_requests) == list(texts)
        contexts = [rng.choice([text, rng.choice(words)]) for text in texts.values()]
        options = {"use_tree_spec": use_tree_spec}
        drafts = cache.speculate_batch(list(texts), contexts, *arguments, **options)
        for req_id, context, draft in zip(texts, contexts, drafts, strict=True):
            assert draft == cache.speculate(req_id, context, *arguments, **options)
            assert (draft.score, draft.match_len) == plain_draft(req_id, context)
            won += draft.score > 0
    assert won > 50
    for req_id in list(texts):
        cache.stop_request(req_id)
    for req_id in list(cache.cached_requests):
        cache.evict_cached_response(req_id)
    assert set(used(cache._forest).values()) == {0}
    assert compiled_versions() == NOT_COMPILED_AGAIN


def test_requests_with_different_salts_never_see_each_others_outputs():
    cache = SuffixDecodingCache(64, -1)
    for salt in ("a", "b", None):
        cache.start_request(salt, [1], cache_salt=salt)
    cache.add_active_response("a", [5, 6, 7, 8])
    cache.stop_request("a")
    arguments = ([0, 5, 6], 4, 1.0, 1.0)
    for salt in ("b", None):
        assert cache.speculate(salt, *arguments).token_ids == []
    cache.start_request("a2", [1], cache_salt="a")
    assert cache.speculate("a2", *arguments).token_ids == [7, 8]


def test_only_responses_are_shared_and_only_if_wanted():
    shares, keeps = SuffixDecodingCache(64, 5), SuffixDecodingCache(64, 0)
    for cache in (shares, keeps):
        cache.start_request(0, [1, 2, 3, 4])
        cache.add_active_response(0, [5, 6, 7])
        cache.start_request(1, [9])
    assert shares.speculate(1, [0, 5, 6]).token_ids == [7]  # of a request that still runs
    assert shares.speculate(1, [0, 2, 3]).token_ids == []
    assert keeps.speculate(1, [0, 5, 6]).token_ids == []
    assert not keeps.cached_requests


def test_the_oldest_response_is_evicted_and_its_request_goes_on():
    cache = SuffixDecodingCache(8, 2)
    for req_id in range(3):
        cache.start_request(req_id, [1, 2])
        cache.add_active_response(req_id, [3, 4])
    assert list(cache.active_requests) == [0, 1, 2]
    assert list(cache.cached_requests) == [1, 2]
    cache.add_active_response(0, [5, 6, 3, 4])  # to its own tree only
    assert cache.speculate(0, [1, 2, 3, 4, 5, 6, 3, 4]).token_ids == [5, 6]
    assert cache.speculate(1, [0, 4, 5]).token_ids == []
    cache.stop_request(0)
    cache.start_request(0, [1])
    assert list(cache.cached_requests) == [2, 0]


def test_an_id_is_used_again_without_its_old_response():
    cache = SuffixDecodingCache(8, -1)
    cache.start_request("r", [1])
    cache.add_active_response("r", [5, 6, 7])
    cache.stop_request("r")
    assert list(cache.cached_requests) == ["r"]
    cache.start_request("r", [1, 5, 6])  # preempted and resumed: what it said is its prompt
    assert cache.speculate("r", [1, 5, 6]).token_ids == []
    cache.add_active_response("r", [7, 5, 6])
    assert cache.speculate("r", [1, 5, 6, 7, 5, 6]).token_ids == [7, 5]


def test_what_is_not_known_is_an_error_and_changes_nothing():
    cache = SuffixDecodingCache(8, -1)
    cache.start_request(0, [1, 2])
    for call, message in (
        (lambda: cache.start_request(0, [1]), "request 0 is already active"),
        (lambda: cache.stop_request(1), "request 1 is not active"),
        (lambda: cache.add_active_response(1, [1]), "request 1 is not active"),
        (lambda: cache.add_active_responses({0: [3], 1: [4]}), "request 1 is not active"),
        (lambda: cache.speculate(1, [1, 2]), "request 1 is not active"),
        (lambda: cache.evict_cached_response(1), "request 1 is not cached"),
        (lambda: cache.speculate_batch([0], [[1], [2]]), "2 contexts and 1 limits for 1"),
        (lambda: cache.speculate(0, [1, 2], 4, float("nan")), "must be finite"),
        (lambda: cache.speculate(0, [1, 2], 4, 1.0, float("inf")), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert cache._forest.arrays.nodes[cache._active[0].root]["count"] == 2
    assert list(cache.active_requests) == list(cache.cached_requests) == [0]


@pytest.mark.parametrize(
    "token_ids",
    [
        np.array([1, 2]),
        np.array([[1, 2]], np.int32),
        np.array([1, 2, 3, 4], np.int32)[::2],
        [1, 2**31],
        [-(2**31) - 1],
    ],
    ids=["int64", "2-D", "strided", "too large", "too small"],
)
def test_tokens_that_are_not_32_bit_or_not_in_one_row_are_refused(token_ids):
    cache = SuffixDecodingCache(8, -1)
    with pytest.raises(ValueError, match=r"int32|32-bit"):
        cache.start_request(0, token_ids)
    assert not cache.active_requests
    cache.start_request(0, [1])
    for call in (cache.add_active_response, cache.speculate):
        with pytest.raises(ValueError, match=r"int32|32-bit"):
            call(0, token_ids)


def test_tokens_come_in_many_forms_and_none_compiles_anything():
    cache = SuffixDecodingCache(8, -1)
    frozen = np.array([1, 2, 3], np.int32)
    frozen.flags.writeable = False
    for req_id, token_ids in enumerate(([1, 2, 3], (1, 2, 3), frozen, [], np.array([], np.int32))):
        cache.start_request(req_id, token_ids)
        cache.add_active_response(req_id, token_ids)
        full = len(token_ids) > 0
        draft = cache.speculate(req_id, token_ids, 3, 1, 0, 0)
        assert (len(draft.token_ids) > 0) == full
    with pytest.raises(TypeError):
        cache.add_active_response(0, [1.5])
    assert compiled_versions() == NOT_COMPILED_AGAIN


def test_none_is_the_depth_and_short_contexts_have_no_draft():
    cache = SuffixDecodingCache(4, 0)
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    cache.start_request(0, text)
    assert cache.speculate(0, text, None, 9.0).token_ids == [3, 4, 5]
    assert cache.speculate(0, text, 1, 9.0).token_ids == [3]
    for empty in (
        cache.speculate(0, []),
        cache.speculate(0, [2]),
        cache.speculate(0, [8, 9], 4),
    ):
        assert empty == SuffixDecodingDraft()
    for limit in (0, -3):  # matched, but nothing is wanted
        assert cache.speculate(0, text, limit) == SuffixDecodingDraft(match_len=3)
    assert cache.speculate_batch([0, 0], [text, text], [1, 2], 9.0) == [
        cache.speculate(0, text, 1, 9.0),
        cache.speculate(0, text, 2, 9.0),
    ]
    assert cache.speculate_batch([], []) == []


def test_of_equal_scores_the_longer_match_and_the_own_tree_win():
    cache = SuffixDecodingCache(64, -1)
    cache.start_request(0, [0])
    cache.add_active_response(0, [1, 2, 3, 1, 2])
    cache.start_request(1, [1, 2, 4, 1, 2])
    draft = cache.speculate(1, [1, 2, 4, 1, 2], 1)
    assert (draft.token_ids, draft.probs, draft.match_len) == ([4], [0.5], 2)
    cache.stop_request(1)
    cache.start_request(1, [1, 2])
    assert cache.speculate(1, [1, 2], 1).token_ids == [3]


def test_a_tree_draft_may_be_longer_than_the_depth():
    cache = SuffixDecodingCache(4, 0)
    text = [t for k in range(30) for t in (1, 2 + k, 3 + k)] + [1]
    cache.start_request(0, text)
    draft = cache.speculate(0, text, 50, 1.0, 50.0, 0.0, True)
    assert len(draft.token_ids) == 50
    most = len(list(continuations_of(text, 4)))
    draft = cache.speculate(0, text, 10**12, 1e30, 1e30, 0.0, True)
    assert len(draft.token_ids) == most


def continuations_of(text, max_depth):
    plain = PlainTree(max_depth)
    for token in text:
        plain.append(0, token)
    return continuations(plain.match(text[-1:]), np.float32(1), np.float32(0))


@pytest.mark.parametrize("limit", [-2, 2**31])
def test_a_wrong_limit_is_refused(limit):
    with pytest.raises(ValueError, match=f"not {limit}"):
        SuffixDecodingCache(8, limit)
    assert SuffixDecodingCache(8, 2**31 - 1).max_cached_requests == 2**31 - 1


def test_a_depth_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1 token deep, not 0"):
        SuffixForest(0)


def test_it_is_used_without_jax():
    code = """
import sys
from arctic_jax.spec_decode import SuffixDecodingCache
cache = SuffixDecodingCache(8, 1)
cache.start_request(0, [1, 2, 3, 1, 2])
assert cache.speculate(0, [1, 2, 3, 1, 2]).token_ids == [3, 1]
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
