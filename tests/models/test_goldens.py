"""What is stored fits what makes it: the same weights, whole arrays."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from arctic_jax.testing import TINY_LLAMA, write_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens"


def test_the_weights_are_the_same_everywhere(tmp_path):
    """The logits were computed on another machine, from weights made by another numpy."""
    tensors = load_file(write_checkpoint(tmp_path, TINY_LLAMA, seed=7) / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    assert digest.hexdigest() == "73bfdf6191c88e392ccada77450784bbcbfa7d2adb5b2b2589c3d556148652c3"


def test_shapes_of_the_greedy_goldens():
    prompts = json.loads((GOLDENS / "smollm2_prompts.json").read_text("utf-8"))
    greedy = np.load(GOLDENS / "smollm2_greedy.npz")
    assert len(prompts) == 32
    assert greedy["token_ids"].shape == greedy["margins"].shape == (32, 64)
    assert greedy["top_ids"].shape == greedy["top_logprobs"].shape == (32, 64, 5)
    np.testing.assert_array_equal(greedy["top_ids"][..., 0], greedy["token_ids"])
    assert (greedy["margins"] > 1e-4).all()
    sizes = [len(prompt["token_ids"]) for prompt in prompts]
    assert (min(sizes), max(sizes)) == (3, 798)
