"""The mixture of experts as a layer, on any mesh, against a loop over tokens in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from arctic_jax.config import MoEConfig
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.models import moe
from arctic_jax.models.layers import RMSNorm, named_parameters
from arctic_jax.models.moe import MoE
from arctic_jax.models.qwen3_moe import Qwen3MoeForCausalLM
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.ragged_dot import reference
from arctic_jax.shift_parallel import MeshLayout, make_mesh, shift, ulysses

HIDDEN, FFN, EXPERTS, TOP_K, EPSILON = 16, 24, 16, 3, 1e-5
CONFIG = MoEConfig(EXPERTS, TOP_K, FFN, norm_topk_prob=True, layers=(0,))
LAYOUTS = [
    pytest.param(layout(tp, sp), (tp, sp), id=f"{layout.__name__}_{tp}x{sp}")
    for layout, tp, sp in [
        (shift, 1, 1),
        (ulysses, 2, 1),
        (ulysses, 1, 4),
        (shift, 1, 4),
        (ulysses, 2, 2),
        (shift, 2, 2),
        (ulysses, 4, 2),
        (shift, 4, 2),
    ]
]


def make_layer(config: MoEConfig = CONFIG, seed: int = 0, **given: np.ndarray) -> MoE:
    """A layer with random weights, or those given by the parameter's name."""
    rng = np.random.default_rng(seed)
    layer = MoE(HIDDEN, config, 1)
    for name, variable in named_parameters(layer).items():
        values = rng.normal(size=variable.shape) / np.sqrt(variable.shape[-1])
        variable[...] = jnp.asarray(given.get(name, values), jnp.float32)
    return layer


def make_tokens(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, HIDDEN)).astype(np.float32)


def run(layer: MoE, x: np.ndarray, layout: MeshLayout, tp: int, sp: int) -> np.ndarray:
    """The layer's output for `x`, whose tokens are split as the layout says."""
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    norm = RMSNorm(HIDDEN, EPSILON)
    norm.weight[...] = jnp.ones(HIDDEN)
    leaves, structure = jax.tree.flatten(layer)
    partitions = [
        layout.partition(p.get_metadata("axis")) for p in named_parameters(layer).values()
    ]
    tokens = PartitionSpec(layout.tokens or None)

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(tp, sp),
        in_specs=(partitions, tokens),
        out_specs=(tokens, tokens),
        check_vma=False,
    )
    def program(leaves: list[jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.tree.unflatten(structure, leaves)(x, jnp.zeros_like(x), norm, layout)

    same, out = jax.jit(program)(leaves, x)
    np.testing.assert_array_equal(same, x)
    return np.asarray(out)


def expected(layer: MoE, x: np.ndarray, experts: np.ndarray | None = None) -> np.ndarray:
    """The formula in float64; `experts [T, k]` are the best ones unless given."""
    weights = {n: np.asarray(p[...], np.float64) for n, p in named_parameters(layer).items()}
    x = x.astype(np.float64)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    scores = np.exp(x @ weights["router"].T)
    scores /= scores.sum(-1, keepdims=True)
    if experts is None:
        experts = np.argsort(-scores, axis=-1, kind="stable")[:, : layer.top_k]
    out = np.zeros_like(x)
    for t, chosen in enumerate(experts):
        total = scores[t, chosen].sum() if layer.norm_topk_prob else 1
        for e in chosen:
            gate, up = np.split(weights["gate_up"][e] @ x[t], 2)
            hidden = gate / (1 + np.exp(-gate)) * up
            out[t] += scores[t, e] / total * (weights["down"][e] @ hidden)
    return out


@pytest.mark.parametrize("count", [40, 4])  # sorted by expert, and too few for that
@pytest.mark.parametrize(("layout", "mesh"), LAYOUTS)
def test_the_formula_on_any_mesh(layout: MeshLayout, mesh: tuple[int, int], count: int) -> None:
    layer, x = make_layer(), make_tokens(count)
    np.testing.assert_allclose(run(layer, x, layout, *mesh), expected(layer, x), atol=1e-5)


def test_weights_need_not_sum_to_one() -> None:
    config = MoEConfig(EXPERTS, TOP_K, FFN, norm_topk_prob=False, layers=(0,))
    layer, x = make_layer(config), make_tokens(8)
    out = run(layer, x, shift(1, 1), 1, 1)
    np.testing.assert_allclose(out, expected(layer, x), atol=1e-5)
    assert np.abs(out - expected(make_layer(), x)).max() > 0.1  # the option does something


@pytest.mark.parametrize(("layout", "mesh"), LAYOUTS)
def test_of_equal_experts_the_first_are_taken(layout: MeshLayout, mesh: tuple[int, int]) -> None:
    layer, x = make_layer(router=np.zeros((EXPERTS, HIDDEN))), make_tokens(8)
    experts = np.tile(np.arange(TOP_K), (8, 1))
    np.testing.assert_allclose(run(layer, x, layout, *mesh), expected(layer, x, experts), atol=1e-5)


@pytest.mark.parametrize(("layout", "mesh"), LAYOUTS)
def test_all_tokens_to_one_expert(layout: MeshLayout, mesh: tuple[int, int]) -> None:
    """One device has all the work, the others have groups of no rows."""
    config = MoEConfig(EXPERTS, 1, FFN, norm_topk_prob=False, layers=(0,))
    favourite, router = 9, np.zeros((EXPERTS, HIDDEN))
    router[favourite, 0] = 3
    layer, x = make_layer(config, router=router), make_tokens(8)
    x[:, 0] = 1 + np.abs(x[:, 0])
    experts = np.full((8, 1), favourite)
    np.testing.assert_allclose(run(layer, x, layout, *mesh), expected(layer, x, experts), atol=1e-5)


def test_a_token_may_go_to_all_experts() -> None:
    config = MoEConfig(4, 4, FFN, norm_topk_prob=True, layers=(0,))
    layer, x = make_layer(config), make_tokens(8)
    np.testing.assert_allclose(run(layer, x, shift(2, 2), 2, 2), expected(layer, x), atol=1e-5)


@pytest.mark.parametrize("padding", [0.0, 1e30, np.inf, np.nan])
def test_padding_rows_change_nothing(padding: float) -> None:
    layer, x = make_layer(), make_tokens(8)
    alone = run(layer, x, shift(2, 2), 2, 2)
    padded = np.concatenate([x, np.full((24, HIDDEN), padding, np.float32)])
    out = run(layer, padded, shift(1, 1), 1, 1)
    np.testing.assert_allclose(out[:8], alone, atol=1e-6)
    other = np.concatenate([x, make_tokens(24, seed=2)])
    np.testing.assert_array_equal(run(layer, other, shift(1, 1), 1, 1)[:8], out[:8])


def test_products_of_no_group_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel leaves them: rows for other devices' experts are not written."""

    def product(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, **_: object):
        defined = jnp.arange(len(rows)) < group_sizes.sum()
        out = reference.ragged_dot(jnp.where(defined[:, None], rows, 0), weight, group_sizes)
        return jnp.where(defined[:, None], out, jnp.nan)

    expert_dot = moe.expert_dot

    def product_of_few(rows: jax.Array, weight: jax.Array, experts: jax.Array, **_: object):
        defined = (experts >= 0) & (experts < len(weight))
        return jnp.where(defined[:, None], expert_dot(rows, weight, experts), jnp.nan)

    monkeypatch.setattr(moe, "ragged_dot", product)
    monkeypatch.setattr(moe, "expert_dot", product_of_few)
    layer = make_layer()
    for x in (make_tokens(40), make_tokens(4)):
        np.testing.assert_allclose(run(layer, x, shift(2, 2), 2, 2), expected(layer, x), atol=1e-5)


@pytest.mark.parametrize("count", [9, 2])
def test_the_kernel_for_hopper_gives_the_same(count: int) -> None:
    config = MoEConfig(4, 2, 64, norm_topk_prob=True, layers=(0,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(count, 64)), jnp.bfloat16)
    outputs = []
    for implementation in ("xla", "mosaic_gpu"):
        layer = MoE(64, config, 1, implementation)
        norm = RMSNorm(64, EPSILON, implementation)
        for i, leaf in enumerate(named_parameters(layer).values()):
            leaf[...] = np.random.default_rng(i).normal(size=leaf.shape).astype(np.float32) / 8
        norm.weight[...] = jnp.ones(64)
        layer, norm = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (layer, norm))
        with dispatch.interpret():
            outputs.append(jax.jit(lambda x, f=layer, n=norm: f(x, 0 * x, n, shift(1, 1))[1])(x))
    want, got = (np.asarray(out, np.float32) for out in outputs)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=0.02)


HF = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"mlp_only_layers": [0, 4]}, (1, 2, 3, 5)),
        ({"decoder_sparse_step": 3}, (2, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [0, 3]}, (1, 5)),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], layers: tuple[int, ...]) -> None:
    config = Qwen3MoeForCausalLM.config_from_hf(HF | changes).moe
    assert config == MoEConfig(8, 2, 16, norm_topk_prob=False, layers=layers)


def test_both_spellings_of_the_number_of_experts() -> None:
    new = {k: v for k, v in HF.items() if k != "num_experts"} | {"num_local_experts": 8}
    read = Qwen3MoeForCausalLM.config_from_hf
    assert read(new) == read(HF)
    assert read(HF | {"num_experts": 0}).moe is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "no key 'num_experts'"),
        ({"moe_intermediate_size": None}, "no key 'moe_intermediate_size'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is not between 1 and num_experts 8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0 is not between"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step 0 is less than 1"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size 64"),
    ],
)
def test_what_is_not_implemented_is_named(changes: dict[str, Any], message: str) -> None:
    config = {k: v for k, v in (HF | changes).items() if v is not None}
    with pytest.raises(UnsupportedModelError, match=message):
        Qwen3MoeForCausalLM.config_from_hf(config)


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts 16 cannot be split over 3 devices"):
        nnx.eval_shape(lambda: MoE(HIDDEN, CONFIG, 3))
