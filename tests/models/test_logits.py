"""Every architecture and every feature against the logits of `transformers`."""

from pathlib import Path

import cases
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from arctic_jax import weights
from arctic_jax.batch import host_views, packed_size, unpack
from arctic_jax.kv_cache import KVCache
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.models.layers import named_parameters
from arctic_jax.models.registry import ARCHITECTURES, model_class
from arctic_jax.scheduled_batch import Bucket
from arctic_jax.shift_parallel import make_mesh, shift
from arctic_jax.testing import write_checkpoint

GOLDENS = Path(__file__).parents[1] / "goldens" / "tiny_logits.npz"


def logits_of(directory: Path, config: dict, token_ids: np.ndarray) -> np.ndarray:
    """Logits of all tokens in one step, by the model alone: no engine."""
    cls = model_class(config)
    model_config = cls.config_from_hf(config)
    model = nnx.eval_shape(lambda: cls(model_config, 1))
    parameters = {
        path: weights.ParameterSpec(variable.shape, np.dtype(np.float32), PartitionSpec())
        for path, variable in named_parameters(model).items()
    }
    placed = weights.load(
        parameters, model.weight_sources(), SafetensorsCheckpoint(directory), make_mesh(1, 1)
    )
    model = jax.tree.unflatten(jax.tree.structure(model), [array for _, array in placed])

    n = len(token_ids)
    bucket = Bucket(n, n, 1, n)
    packed = np.zeros(packed_size(bucket, 4), np.int32)
    views = host_views(packed, bucket, 4)
    views["token_ids"][:] = token_ids
    views["positions"][:] = views["slot_mapping"][:] = views["logit_rows"][:] = np.arange(n)
    views["query_start_loc"][:] = [0, n]
    views["seq_lens"][:] = n
    views["block_tables"][0] = range(4)
    heads, head_dim = model.num_kv_groups, model_config.head_dim
    empty = np.zeros((model_config.num_hidden_layers, 4, heads, 16, head_dim), np.float32)
    out, _ = jax.jit(lambda m, p, c: m(unpack(p, bucket, 4), c, shift(1, 1)))(
        model, packed, KVCache(empty, empty)
    )
    return np.asarray(out)


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    goldens = np.load(GOLDENS)
    config = cases.CASES[name]
    write_checkpoint(tmp_path, config, cases.SEED)
    logits = logits_of(tmp_path, config, goldens[f"{name}/token_ids"])
    np.testing.assert_allclose(logits, goldens[f"{name}/logits"], rtol=2e-4, atol=2e-4)


def test_every_architecture_has_a_case() -> None:
    """`transformers` has no SwiftKV: see `test_llama_swiftkv.py`."""
    known = {name for name in ARCHITECTURES if "SwiftKV" not in name}
    assert {c["architectures"][0] for c in cases.CASES.values()} == known
