"""Users' settings of speculation: Arctic's keys, vLLM's keys, and what is refused."""

import logging
from dataclasses import replace

import pytest

from arctic_jax.config import EngineConfig
from arctic_jax.speculative_config import SpeculativeConfig


def of(**given: object) -> SpeculativeConfig:
    return SpeculativeConfig.from_user(given)


def test_without_a_config_nobody_speculates() -> None:
    assert EngineConfig.from_keywords().speculative.max_draft_len == 0
    assert SpeculativeConfig.from_user(None).kind is None


def test_json_and_dictionaries_reach_the_engine() -> None:
    for given in ({"method": "ngram"}, '{"method": "ngram"}'):
        config = EngineConfig.from_keywords(speculative_config=given).speculative
        assert (config.kind, config.max_draft_len) == ("ngram", 4)


def test_arctics_and_vllms_keys_mean_the_same() -> None:
    arctic = of(
        method="suffix",
        suffix_cache_max_depth=24,
        suffix_cache_max_requests=10,
        suffix_max_spec_factor=2.0,
        suffix_min_token_prob=0.2,
    )
    vllm = of(
        method="suffix",
        suffix_decoding_max_tree_depth=24,
        suffix_decoding_max_cached_requests=10,
        suffix_decoding_max_spec_factor=2.0,
        suffix_decoding_min_token_prob=0.2,
    )
    assert arctic == vllm
    assert arctic.suffix_cache_max_depth == 24


@pytest.mark.parametrize(
    ("given", "longest"),
    [
        ({"method": "suffix"}, 16),
        ({"enable_suffix_decoding": True}, 16),
        ({"method": "suffix", "num_speculative_tokens": 5}, 5),
        ({"method": "suffix", "num_speculative_tokens": 5, "suffix_speculative_tokens": 9}, 9),
        ({"method": "ngram", "num_speculative_tokens": 5, "suffix_speculative_tokens": 9}, 5),
    ],
)
def test_longest_drafts(given: dict, longest: int) -> None:
    assert SpeculativeConfig.from_user(given).max_draft_len == longest


@pytest.mark.parametrize(
    ("given", "longest"),
    [
        ({"method": "suffix", "suffix_use_tree_spec": True}, 16),
        ({"enable_suffix_decoding": True, "use_tree_spec": True, "num_speculative_tokens": 31}, 31),
        (
            {"method": "arctic", "model": "m", "num_speculative_tokens": 3}
            | {"enable_suffix_decoding": True, "suffix_use_tree_spec": True},
            31,
        ),
    ],
)
def test_longest_trees(given: dict, longest: int) -> None:
    config = SpeculativeConfig.from_user(given)
    assert config.suffix_use_tree_spec
    assert config.max_draft_len == longest


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"method": "ngram"}, "suffix_use_tree_spec must be false without suffix decoding"),
        ({"method": "arctic", "model": "m"}, "must be false without suffix decoding"),
        (
            {"method": "draft_model", "model": "m", "enable_suffix_decoding": True},
            "suffix_use_tree_spec must be false beside a draft model",
        ),
        ({"method": "suffix", "num_speculative_tokens": 32}, "num_speculative_tokens must be at"),
        ({"method": "suffix", "suffix_speculative_tokens": 40}, "must be at most 31 with"),
    ],
)
def test_where_there_are_no_trees(given: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        SpeculativeConfig.from_user(given | {"suffix_use_tree_spec": True})


ARCTIC = {"method": "arctic", "model": "m", "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("given", "longest"),
    [
        (ARCTIC, 3),
        (ARCTIC | {"method": "mlp_speculator"}, 3),
        (ARCTIC | {"method": "draft_model"}, 3),
        (ARCTIC | {"enable_suffix_decoding": True}, 64),
        (ARCTIC | {"enable_suffix_decoding": True, "suffix_cache_max_depth": 500}, 128),
        (ARCTIC | {"enable_suffix_decoding": True, "suffix_speculative_tokens": 7}, 7),
        (ARCTIC | {"enable_suffix_decoding": True, "suffix_speculative_tokens": 2}, 3),
    ],
)
def test_longest_drafts_with_a_speculator(given: dict, longest: int) -> None:
    config = SpeculativeConfig.from_user(given)
    assert config.max_draft_len == longest
    assert config.num_drafted_on_device == 3
    assert config.drafts_on_device


def test_how_much_a_speculator_drafts_may_be_left_to_it() -> None:
    config = of(method="arctic", model="m", disable_by_batch_size=8)
    assert (config.kind, config.num_drafted_on_device) == ("arctic", 0)


def test_ngram_lengths_default_to_each_other() -> None:
    assert of(method="ngram").lookup_lengths == (5, 5)
    assert of(method="ngram", prompt_lookup_max=3).lookup_lengths == (3, 3)
    assert of(method="ngram", prompt_lookup_min=2).lookup_lengths == (2, 2)
    assert of(method="ngram", prompt_lookup_min=2, prompt_lookup_max=4).lookup_lengths == (2, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "eagle", "model": "x"}, "'eagle' is not supported; supported: suffix, ngram"),
        ({"method": "arctic"}, "method 'arctic' needs a speculator, give its model"),
        ({"method": "draft_model"}, "method 'draft_model' needs a draft model, give its model"),
        ({"method": "arctic", "model": 3}, "model must be a name, got 3"),
        ({}, "names no method; supported: suffix, ngram"),
        ({"method": "suffix", "sufix": 1}, r"unknown key\(s\) sufix"),
        ({"method": "suffix", "num_speculative_tokens": 0}, "between 1 and 128, got 0"),
        ({"method": "suffix", "num_speculative_tokens": True}, "must be an integer, got True"),
        ({"method": "suffix", "suffix_cache_max_depth": None}, "must be an integer, got None"),
        ({"method": "suffix", "suffix_min_token_prob": float("nan")}, "finite number, got nan"),
        ({"method": "suffix", "adaptive": 1}, "adaptive must be true or false, got 1"),
        ({"method": "ngram", "enable_suffix_decoding": True}, "cannot be combined"),
        ({"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 2}, "at most"),
        ({"suffix_cache_max_depth": 9, "suffix_decoding_max_tree_depth": 9}, "setting twice"),
        ("{", "is not JSON"),
        ("[1]", r"must be a dictionary, got \[1\]"),
    ],
)
def test_mistakes_are_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_keywords(speculative_config=given)


def test_a_soft_cut_off_above_the_hard_one_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "arctic_jax"):
        of(method="suffix", hard_disable_by_batch_size=8)
    assert "hard_disable_by_batch_size=8 is not above disable_by_batch_size=64" in caplog.text


@pytest.mark.parametrize(
    ("config", "on_gpu"),
    [
        ({"method": "suffix"}, True),
        ({"method": "arctic", "model": "m", "enable_suffix_decoding": True}, True),
        ({"method": "arctic", "model": "m"}, False),
        ({"method": "suffix", "suffix_use_tree_spec": True}, False),
        ({"method": "suffix", "suffix_on_device": False}, False),
        ({"method": "ngram"}, False),
    ],
)
def test_gpus_look_for_suffixes_themselves(config: dict, on_gpu: bool) -> None:
    given = SpeculativeConfig.from_user(config)
    assert given.on("gpu").suffix_on_device is on_gpu
    assert given.on("cpu").suffix_on_device is False


def test_how_much_is_drafted_on_the_device() -> None:
    on_device = {"suffix_on_device": True}
    alone = SpeculativeConfig.from_user({"method": "suffix", **on_device})
    assert alone.max_draft_len == alone.num_drafted_on_device == 15
    assert replace(alone, num_speculative_tokens=7).max_draft_len == 7
    both = {"method": "arctic", "model": "m", "enable_suffix_decoding": True, **on_device}
    hybrid = SpeculativeConfig.from_user(both | {"num_speculative_tokens": 3})
    assert hybrid.max_draft_len == hybrid.num_drafted_on_device == 15
    assert replace(hybrid, suffix_speculative_tokens=9).max_draft_len == 9
