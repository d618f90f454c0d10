"""The sizes of the `linear_gelu` kernel: clusters, pieces, slots that are used again."""

import functools

import jax
import jax.numpy as jnp
import pytest
from kernel_checks import check, check_lowers, interpreted

from arctic_jax.pallas_kernels.gelu import gelu
from arctic_jax.pallas_kernels.linear_gelu import cases, linear_gelu, mosaic_gpu
from arctic_jax.pallas_kernels.linear_gelu.mosaic_gpu import Config

# Either warpgroup of a thread block takes several tiles, whose steps are more than the slots.
CONFIGS = {
    "alone": (cases.Case("", 300, 192, 256), Config(64, 128, 2, blocks=2)),
    "one_piece": (cases.Case("", 264, 128, 128), Config(64, 64, 3, pieces=1, blocks=1)),
    # Half of the last row of tiles is past the end of the tokens.
    "half_tiles": (cases.Case("", 320, 64, 256), Config(128, 128, 2, blocks=1)),
    # The last tile of a cluster is past the end of the tokens.
    "shared_weight": (cases.Case("", 575, 64, 128), Config(128, 64, 2, "weight", blocks=2)),
    "shared_tokens": (cases.Case("", 200, 128, 512), Config(64, 128, 3, "tokens", blocks=4)),
    "fewer_tiles_than_blocks": (cases.Case("", 64, 64, 128), Config(64, 128, 4, blocks=3)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_do_not_change_the_result(name, capsys):
    case, config = CONFIGS[name]
    with interpreted(capsys) as interpret:
        call = functools.partial(mosaic_gpu.linear_gelu, config=config, interpret=interpret)
        check(cases, case, call)


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_lower_for_cuda(name):
    case, config = CONFIGS[name]
    check_lowers(cases, case, functools.partial(mosaic_gpu.linear_gelu, config=config))


@pytest.mark.parametrize("N", [64, 192, 384, 1536, 3072, 4096])
@pytest.mark.parametrize("T", [1, 64, 500, 32768])
def test_outputs_of_encoders_have_sizes(T, N):
    config = mosaic_gpu.choose_config(T, N)
    assert config is not None
    assert N % (config.outputs * config.across) == 0
    assert config.rows == 64 or T > 64


# benchmarks/results/h200/tune_linear_gelu.json
@pytest.mark.parametrize(
    ("T", "N", "fast"),
    [
        (32768, 3072, Config(128, 192, 4, "tokens")),
        (4096, 3072, Config(128, 192, 4, "tokens")),
        (32768, 1536, Config(128, 192, 4, "tokens")),
        (32768, 4096, Config(192, 128, 5, "tokens", pieces=1)),
    ],
)
def test_sizes_are_those_measured_fast(T, N, fast):
    assert mosaic_gpu.choose_config(T, N) == fast


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((128, 256, 2), "too many"),
        ((96, 128, 2), "multiples of 64"),
        ((128, 128, 1), "at least 2"),
        ((192, 64, 2), "pieces"),
        ((128, 128, 9), "bytes"),
        ((128, 128, 4, "bias"), "neither"),
        ((128, 128, 4, "weight", 2, 3), "clusters"),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Config(*sizes)


def test_outputs_that_the_sizes_do_not_divide_are_refused():
    arguments, _ = cases.inputs(cases.Case("", 64, 64, 192))
    with pytest.raises(ValueError, match="192 outputs are not divided"):
        mosaic_gpu.linear_gelu(*arguments, config=Config(128, 128, 2))


def test_shapes_that_do_not_fit_are_refused():
    x, weight, bias = cases.inputs(cases.Case("", 8, 64, 128))[0]
    with pytest.raises(ValueError, match="weight"):
        linear_gelu(x[:, :32], weight, bias)
    with pytest.raises(ValueError, match="bias"):
        linear_gelu(x, weight, bias[:64])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cpus_it_is_what_encoders_compute(dtype):
    x, weight, bias = cases.inputs(cases.Case("", 40, 64, 128, dtype=dtype))[0]
    ours = jax.jit(linear_gelu)(x, weight, bias)
    theirs = jax.jit(lambda x, weight, bias: gelu(x @ weight + bias))(x, weight, bias)
    assert jnp.array_equal(ours, theirs)
