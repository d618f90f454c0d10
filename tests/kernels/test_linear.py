"""The sizes of the `linear` kernel: clusters, several warpgroups, stages that are used again."""

import functools

import jax
import jax.numpy as jnp
import pytest
from kernel_checks import check, check_lowers, interpreted

from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.linear import cases, linear, mosaic_gpu
from arctic_jax.pallas_kernels.linear.mosaic_gpu import Config, Problem

# Steps are more than stages, and neither they nor the tokens are divided by the splits.
CONFIGS = {
    "split_multicast": (
        cases.Case("", 48, (256, 448)),
        Config(128, 64, 2, splits=2, multicast=2),
    ),
    "gated_warpgroups": (
        cases.Case("", 16, (1, 2, 128, 384), gated=True),
        Config(128, 128, 2, warpgroups=2),
    ),
    "inputs_first_warpgroups_split": (
        cases.Case("", 8, (448, 128), inputs_first=True),
        Config(128, 64, 2, splits=3, warpgroups=2),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_do_not_change_the_product(name, capsys):
    case, config = CONFIGS[name]
    with interpreted(capsys) as interpret:
        call = functools.partial(mosaic_gpu.linear, bias=None, config=config, interpret=interpret)
        check(cases, case, call)


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_lower_for_cuda(name):
    case, config = CONFIGS[name]
    check_lowers(cases, case, functools.partial(mosaic_gpu.linear, bias=None, config=config))


def problem(tokens: int, product: str, model: str = "llama_8b") -> Problem:
    case = cases.Case("", tokens, **cases.LAYERS[model][product])
    x, weight = jax.eval_shape(lambda: cases.inputs(case)[0])
    return Problem.of(x, weight, case.gated, case.inputs_first)


@pytest.mark.parametrize("model", cases.LAYERS)
@pytest.mark.parametrize("tokens", [2, 16, 64, 128])
def test_products_of_real_layers_have_sizes(model, tokens):
    for product in cases.LAYERS[model]:
        sizes = problem(tokens, product, model)
        config = mosaic_gpu.choose_config(sizes)
        assert config is not None
        assert sizes.refuses(config) is None
        blocks = sizes.shards * sizes.outputs // config.outputs * config.splits
        if blocks > mosaic_gpu.SMS:  # then two run at once on a multiprocessor
            assert 2 * (sizes.smem_bytes(config) + 1024) <= mosaic_gpu.SMEM_BYTES


# benchmarks/results/h200/tune_linear.json
@pytest.mark.parametrize(
    ("product", "fast"),
    [
        ("gate_up", Config(64, 64, 4, multicast=2)),
        ("down", Config(64, 128, 6, splits=2)),
        ("qkv", Config(64, 128, 6, multicast=4)),
        ("output", Config(64, 128, 6, splits=2)),
    ],
)
def test_sizes_are_those_measured_fast(product, fast):
    assert mosaic_gpu.choose_config(problem(64, product)) == fast


@pytest.mark.parametrize(
    ("tokens", "shape", "kernel"),
    [
        (64, (4096, 4096), True),
        (9, (4096, 4096), True),
        (8, (4096, 4096), False),
        (64, (1024, 3072), True),
        (64, (1024, 3008), False),  # less than 6 MiB
        (128, (4096, 4096), True),
        (129, (4096, 4096), False),
        (64, (1, 2, 4096, 4096), True),  # a SwiGLU pair
        (65, (1, 2, 4096, 4096), False),
        (64, (4097, 4096), False),  # tiles of 64 do not divide it
    ],
)
def test_kernel_is_chosen_where_it_was_measured_faster(tokens, shape, kernel):
    x = jax.ShapeDtypeStruct((tokens, shape[-1]), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    gated = len(shape) == 4
    with dispatch.lowering_for_hopper():
        # A new function object, since what is traced depends on the machine it is for.
        traced = jax.jit(lambda *arguments: linear(*arguments, gated=gated)).trace(x, weight)
    assert ("mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()) == kernel


# benchmarks/results/h200/suite/kernels_linear.json
@pytest.mark.parametrize(
    ("product", "model", "kernel"),
    [
        ("down", "qwen3_06b", True),
        ("output", "smollm2_135m", True),
        ("output", "llama_8b_tp2", True),
        ("output", "llama_8b", False),
        ("down", "llama_8b_tp4", False),
    ],
)
def test_kernel_for_one_token_is_chosen_where_it_was_measured_faster(product, model, kernel):
    case = cases.Case("", 1, **cases.LAYERS[model][product])
    x, weight = jax.eval_shape(lambda: cases.inputs(case)[0])
    with dispatch.lowering_for_hopper():
        traced = jax.jit(lambda *arguments: linear(*arguments, inputs_first=True)).trace(x, weight)
    assert ("mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()) == kernel


def test_sizes_that_do_not_fit_are_refused():
    sizes = problem(120, "gate_up")
    for config, reason in (
        (Config(96 * 64, 64, 2), "not divided"),
        (Config(64, 64, 2, multicast=3), "not divided"),
        (Config(64, 64, 2, multicast=8), "copies"),
        (Config(64, 256, 4), "shared memory"),
        (Config(256, 64, 2), "registers"),
    ):
        assert reason in (sizes.refuses(config) or "")
    for bad in ({"outputs": 96}, {"depth": 32}, {"stages": 1}, {"splits": 9}, {"warpgroups": 2}):
        with pytest.raises(ValueError, match=f"self.{next(iter(bad))}"):
            Config(**{"outputs": 64, "depth": 64, "stages": 2} | bad)


def test_arguments_that_do_not_fit_are_errors():
    x, weight = jnp.zeros((4, 64)), jnp.zeros((32, 64))
    for arguments, keywords, message in (
        ((x, weight.T), {}, r"x.shape=\(4, 64\)"),
        ((x, weight), {"inputs_first": True}, "inputs_first=True"),
        ((x, weight, x[0]), {}, r"bias.shape=\(64,\)"),
        ((x, weight), {"gated": True}, r"\[shards, 2, F, K\]"),
        ((x, weight[None, None]), {"inputs_first": True}, "without a gate"),
        ((x, weight), {"implementation": "mosaic_gpu"}, "mosaic_gpu"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(*arguments, **keywords)
