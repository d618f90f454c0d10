"""Reducing a speculator's heads: which tokens are kept, and what is written."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_speculator import LSTM, MLP, make_speculator, write_speculator

from arctic_jax.config import LoadConfig
from arctic_jax.testing import TINY_LLAMA, write_model
from arctic_jax.training.reduce_speculator import reduce

SIZES = {"vocab_size": TINY_LLAMA["vocab_size"]}
A, B, C, EOS, OTHER_EOS = (*b"abc", 257, 260)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadConfig:
    path = write_model(tmp_path_factory.mktemp("base"), TINY_LLAMA)
    ends = {"eos_token_id": [EOS, OTHER_EOS]}
    (path / "generation_config.json").write_text(json.dumps(ends))
    return LoadConfig(model=str(path))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """In answers there are five a, two ends, one b and one c; in questions nothing but z."""
    asked = [{"role": "user", "content": "zzzzzzzz"}, {"role": "assistant", "content": "aac"}]
    paths = []
    for i, line in enumerate([{"text": "aaab"}, {"messages": asked}]):
        paths.append(tmp_path_factory.mktemp("text") / f"{i}.jsonl")
        paths[-1].write_text(json.dumps(line) + "\n")
    return paths


@pytest.mark.parametrize(
    ("kept", "share"),
    [
        ([EOS], 2 / 9),
        ([EOS, OTHER_EOS], 2 / 9),
        ([A, EOS, OTHER_EOS], 7 / 9),
        ([A, B, EOS, OTHER_EOS], 8 / 9),
        ([0, 1, A, B, C, EOS, OTHER_EOS], 1),
    ],
)
def test_ends_and_frequent_tokens_are_kept(
    kept: list[int], share: float, base: LoadConfig, text: list[Path], tmp_path: Path
) -> None:
    config = LSTM | SIZES | {"input_hidden_dim": TINY_LLAMA["hidden_size"]}
    path, out = write_speculator(tmp_path / "whole", config), tmp_path / "reduced"
    assert reduce(str(path), base, text, len(kept), out) == pytest.approx(share)
    found = load_file(out / "model.safetensors")["draft_token_ids"]
    assert found.dtype == np.int32
    assert found.tolist() == kept


def test_all_but_the_heads_is_as_it_was(base: LoadConfig, text: list[Path], tmp_path: Path) -> None:
    """Names with a prefix are the only ones that lose something."""
    config = MLP | SIZES | {"emb_dim": TINY_LLAMA["hidden_size"], "some_key": "kept"}
    whole = make_speculator(config)
    for name in ("head.0.weight", "emb.1.weight"):
        whole[name] = whole[name].astype(ml_dtypes.bfloat16)
    prefixed = {f"speculator.{name}": tensor for name, tensor in whole.items()}
    path, out = write_speculator(tmp_path / "whole", config, prefixed), tmp_path / "reduced"
    reduce(str(path), base, text, 100, out)
    assert json.loads((out / "config.json").read_text()) == config | {"draft_vocab_size": 100}
    found = load_file(out / "model.safetensors")
    ids = found.pop("draft_token_ids")
    heads = [f"head.{i}.weight" for i in range(config["n_predict"])]
    wanted = whole | {name: whole[name][ids] for name in heads}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        np.testing.assert_array_equal(tensor, wanted[name])
