"""Norm and matrix product: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

# Largest difference in one element, relative to 1 + |expected|: the roundings of the sum, of the
# norm, of the products and of the activation, each of them a number near 1.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """`tokens` rows of the residual stream times a weight `[..., K]`."""

    tokens: int
    weight: tuple[int, ...]
    _: dataclasses.KW_ONLY
    gated: bool = False
    bias: bool = False


LLAMA_8B_QKV = (8, 768, 4096)
LLAMA_8B_MLP = (1, 2, 14336, 4096)
QWEN3_06B_MLP = (1, 2, 3072, 1024)
SMOLLM2_135M_QKV = (3, 320, 576)
SMOLLM2_135M_MLP = (1, 2, 1536, 576)

CASES = (
    Case("b1_qkv", 1, (2, 12, 1024), race_detection=True),
    Case("b1_mlp", 1, (1, 2, 40, 1024), gated=True, race_detection=True),
    Case("b1_mlp_two_shards", 1, (2, 2, 12, 512), gated=True),
    Case("b1_llama_8b", 1, (1056, 4096)),  # more than one step a thread block
    Case("b1_llama_70b", 1, (6, 8192)),
    Case("b1_llama_70b_mlp", 1, (1, 2, 4, 8192), gated=True),
    Case("b1_smollm2", 1, (3, 24, 576), race_detection=True),
    Case("b1_smollm2_mlp", 1, (2, 2, 24, 576), gated=True, race_detection=True),
    Case("b1_qwen2_05b", 1, (16, 896), dtype="float16"),
    Case("b1_fp16", 1, (1, 2, 8, 2048), gated=True, dtype="float16"),
    Case("b1_fp32", 1, (24, 1024), dtype="float32"),
    Case("b1_bias", 1, (24, 1024), bias=True),
    Case("b1_odd_rows", 1, (7, 256)),
    Case("b2_mlp", 2, (1, 2, 24, 1024), gated=True, race_detection=True),
    Case("b2_long_rows", 2, (1, 2, 24, 2048), gated=True),
    Case("b3_smollm2", 3, (3, 24, 576)),
    Case("b8_smollm2_mlp", 8, (2, 2, 24, 576), gated=True, race_detection=True),
    Case("b6_smollm2", 6, (1, 2160, 576)),  # more than one step a thread block
    Case("b7_too_many", 7, (1, 4800, 576)),
    Case("b3_bias", 3, (2, 2, 16, 576), gated=True, bias=True),
    Case("hidden_100", 1, (8, 100)),
    Case("b1_llama_8b_qkv", 1, LLAMA_8B_QKV, tags="bench"),
    Case("b1_llama_8b_mlp", 1, LLAMA_8B_MLP, tags="bench", gated=True),
    Case("b1_qwen3_06b_mlp", 1, QWEN3_06B_MLP, tags="bench", gated=True),
    Case("b1_smollm2_135m_qkv", 1, SMOLLM2_135M_QKV, tags="bench"),
    Case("b1_smollm2_135m_mlp", 1, SMOLLM2_135M_MLP, tags="bench", gated=True),
    *(
        Case(f"b{tokens}_{model}_{name}", tokens, weight, tags="bench", gated=name == "mlp")
        for model, name, weight in (
            ("smollm2_135m", "qkv", SMOLLM2_135M_QKV),
            ("smollm2_135m", "mlp", SMOLLM2_135M_MLP),
            ("qwen3_06b", "mlp", QWEN3_06B_MLP),
        )
        for tokens in (4, 8, 16)
    ),
    Case("b64_llama_8b_mlp", 64, LLAMA_8B_MLP, tags="bench", gated=True),
    Case("b256_llama_8b_mlp", 256, LLAMA_8B_MLP, tags="bench", gated=True),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.norm_linear`; all of them are read, so nothing is poisoned."""
    del poison
    keys = jax.random.split(jax.random.key(seed), 5)
    dtype, size = jnp.dtype(case.dtype), case.weight[-1]
    x = 2 * jax.random.normal(keys[0], (case.tokens, size), dtype)
    delta = jax.random.normal(keys[1], x.shape, dtype)
    norm_weight = jax.random.uniform(keys[2], (size,), dtype, 0.5, 1.5)
    weight = jax.random.normal(keys[3], case.weight, dtype) * jnp.asarray(size**-0.5, dtype)
    bias = (jax.random.normal(keys[4], case.weight[:-1], dtype),) if case.bias else ()
    return (x, delta, norm_weight, weight, *bias), {"epsilon": 1e-5, "gated": case.gated}


def expected(case: Case, arguments: tuple, keywords: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the product in float64, one shard after another."""
    x, delta, norm_weight, weight, *bias = (np.asarray(a).astype(np.float64) for a in arguments)
    x = x + delta
    root_mean_square = np.sqrt((x * x).mean(axis=1, keepdims=True) + keywords["epsilon"])
    product = np.tensordot(x / root_mean_square * norm_weight, weight, (1, weight.ndim - 1))
    product += bias[0] if bias else 0
    if case.gated:
        gate, up = product[:, :, 0], product[:, :, 1]
        product = gate / (1 + np.exp(-gate)) * up
    return x, product.reshape(case.tokens, -1)


comparable = cases.finite


def following(arguments: tuple, output: tuple) -> tuple:
    """Return `arguments` with a part of the product as `delta`: calls run one after another."""
    product = jnp.resize(output[1], arguments[1].shape)
    return (arguments[0], product, *arguments[2:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved and the floating-point operations that must be done."""
    weight = float(np.prod(case.weight))
    outputs = weight / case.weight[-1] / (2 if case.gated else 1)
    elements = weight + case.tokens * (3 * case.weight[-1] + outputs)
    return elements * jnp.dtype(case.dtype).itemsize, 2.0 * case.tokens * weight
