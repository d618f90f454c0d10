"""Every range of the engine's options, and how they are put together from flat names."""

import logging
import math
from typing import Any

import pytest

from arctic_jax.config import EngineConfig, ModelConfig, RopeConfig, SchedulerConfig, StepLimits
from arctic_jax.errors import UnsupportedModelError

COUNTS = (
    "max_model_len",
    "data_parallel_size",
    "tensor_parallel_size",
    "ulysses_sequence_parallel_size",
    "block_size",
    "num_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_mixed_tokens",
    "num_scheduler_steps",
)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_must_be_positive_integers(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
            EngineConfig.from_keywords(**{name: value})
    for wrong in (1.5, math.nan, math.inf, "4", True, [1]):
        with pytest.raises(ValueError, match=f"{name} must be an integer, got "):
            EngineConfig.from_keywords(**{name: wrong})
    EngineConfig.from_keywords(**{name: 1})


@pytest.mark.parametrize("name", ["gpu_memory_utilization", "cpu_memory_share"])
def test_shares_must_be_shares(name: str) -> None:
    for value in (0, -0.1, 1.1, math.nan, math.inf, "0.5", True, None):
        with pytest.raises(ValueError, match=rf"{name} must be in \(0, 1\], got "):
            EngineConfig.from_keywords(**{name: value})
    EngineConfig.from_keywords(**{name: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of .*'float16'.*, got 'int8'"),
        ({"load_format": "gguf"}, "load_format must be one of .*'dummy'.*, got 'gguf'"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy must be one of .*, got 'lifo'"),
        ({"max_logprobs": -1}, "max_logprobs must not be negative, got -1"),
        ({"max_logprobs": 2.5}, "max_logprobs must be an integer, got 2.5"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
    ],
)
def test_other_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_keywords(**options)


def test_flat_names_reach_their_parts() -> None:
    config = EngineConfig.from_keywords(
        model="m", dtype="bfloat16", tensor_parallel_size=2, block_size=16, max_num_seqs=3
    )
    assert (config.load.model, config.load.dtype) == ("m", "bfloat16")
    assert config.parallel.num_devices == 2
    assert (config.cache.block_size, config.scheduler.max_num_seqs) == (16, 3)


def test_no_seed_is_the_default_seed() -> None:
    assert EngineConfig.from_keywords(seed=None) == EngineConfig()


def test_unknown_names_are_refused_together() -> None:
    with pytest.raises(TypeError, match=r"unknown engine option\(s\): apples, bananas"):
        EngineConfig.from_keywords(bananas=1, apples=2)


def test_options_of_vllm_without_meaning_are_let_pass(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "arctic_jax"):
        config = EngineConfig.from_keywords(enforce_eager=True, trust_remote_code=True)
    assert config == EngineConfig()
    assert "enforce_eager=True has no effect here" in caplog.text
    assert "trust_remote_code=True has no effect here" in caplog.text


def test_limits_depend_on_the_backend_unless_given() -> None:
    assert SchedulerConfig().limits("cpu").max_num_seqs == 16
    assert SchedulerConfig().limits("gpu") == StepLimits(256, 8192, 512)
    assert SchedulerConfig().limits("gpu", num_devices=4) == StepLimits(256, 8192, 2048)
    assert SchedulerConfig(max_num_mixed_tokens=512).limits("gpu", 4).max_num_mixed_tokens == 512
    assert SchedulerConfig(max_num_seqs=3).limits("gpu") == StepLimits(3, 8192, 512)
    assert SchedulerConfig(max_num_batched_tokens=64).limits("gpu") == StepLimits(256, 64, 64)


HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def test_a_model_config_fills_in_what_hugging_face_leaves_out() -> None:
    config = ModelConfig.from_hf(HF | {"some_new_key": [1]})
    assert (config.num_key_value_heads, config.head_dim) == (4, 4)
    assert config.rope == RopeConfig(original_max_position_embeddings=64)
    assert config.sliding_window(0) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "no key 'vocab_size'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple .* 3"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'dynamic' in rope_scaling"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "rope_type 'su'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full": {"rope_theta": 1}}}, "differ between layers"),
    ],
)
def test_models_that_are_not_implemented_name_the_key(
    changes: dict[str, Any], message: str
) -> None:
    config = {k: v for k, v in (HF | changes).items() if v is not None}
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_hf(config)


def test_both_spellings_of_rope() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}
    assert ModelConfig.from_hf(HF | old).rope == ModelConfig.from_hf(HF | new).rope
    assert ModelConfig.from_hf(HF | old).rope.factor == 4.0
