"""A mixture of experts through the engine: the plain model's tokens, whatever the layout."""

from pathlib import Path

import jax
import numpy as np
import plain_model
import pytest
from safetensors.numpy import load_file
from tiny_engine import GREEDY, make_engine, run

from arctic_jax.engine.core import EngineCore
from arctic_jax.testing import write_checkpoint

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],  # layers of both kinds in one model
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
PROMPTS = [
    [int(t) for t in np.random.default_rng(i).integers(0, 97, n)] for i, n in enumerate((1, 5, 33))
]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    directory: Path = tmp_path_factory.mktemp("moe")
    return load_file(write_checkpoint(directory, CONFIG, seed=3) / "model.safetensors")


@pytest.fixture(scope="module")
def expected(tensors: dict[str, np.ndarray]) -> list[list[int]]:
    return [plain_model.greedy(CONFIG, tensors, p, GREEDY.max_tokens) for p in PROMPTS]


def answers(engine: EngineCore) -> list[list[int]]:
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, GREEDY)
    done = run(engine)
    engine.check()
    return [done[str(i)].outputs[0].token_ids for i in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("tp", "sp", "threshold"),
    [
        (1, 1, None),
        (2, 2, 0),
        (2, 2, 10**6),
        (1, 4, 0),
        (1, 4, 4),  # long steps by Ulysses, short ones shifted: the same experts' memory
        (1, 4, 10**6),
        (4, 2, 0),
        (4, 2, 10**6),
    ],
)
def test_any_layout_gives_the_plain_models_tokens(
    tp: int,
    sp: int,
    threshold: int | None,
    tensors: dict[str, np.ndarray],
    expected: list[list[int]],
) -> None:
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    engine = make_engine(
        CONFIG,
        tensors,
        tensor_parallel_size=tp,
        ulysses_sequence_parallel_size=sp,
        shift_parallel_threshold=threshold,
        max_num_seqs=2,
        max_num_batched_tokens=8,
    )
    assert answers(engine) == expected


def test_experts_that_cannot_be_split_are_refused() -> None:
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices")
    with pytest.raises(ValueError, match="num_experts 6 cannot be split over 4 devices"):
        make_engine(
            CONFIG | {"num_experts": 6},
            {},
            tensor_parallel_size=2,
            ulysses_sequence_parallel_size=2,
        )
