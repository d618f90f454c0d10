"""Product with a weight: the named shapes that tests and benchmarks run, and the float64 formula.

`pallas_kernels/cases.py` says what each name is for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arctic_jax.pallas_kernels import cases

# Largest difference in one element, relative to 1 + |expected|: the roundings of the products, and
# for "xla" those before the bias, the gate and the activation; each of them a number near 1.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """`tokens` rows times a weight `[..., K]`, or `[K, N]` if `inputs_first`."""

    tokens: int
    weight: tuple[int, ...]
    _: dataclasses.KW_ONLY
    gated: bool = False
    inputs_first: bool = False
    bias: bool = False


def layer(
    hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, devices: int = 1
) -> dict[str, dict]:
    """Return the four products of a decoder's layer, on one of `devices`, as keywords of `Case`."""
    width = (heads // kv_heads + 2) * head_dim
    return {
        "qkv": {"weight": (kv_heads // devices, width, hidden)},
        "output": {"weight": (heads * head_dim // devices, hidden), "inputs_first": True},
        "gate_up": {"weight": (1, 2, ffn // devices, hidden), "gated": True},
        "down": {"weight": (ffn // devices, hidden), "inputs_first": True},
    }


LLAMA_8B = (4096, 32, 8, 128, 14336)
QWEN3_06B = (1024, 16, 8, 128, 3072)
SMOLLM2_135M = (576, 9, 3, 64, 1536)
LAYERS = {
    "llama_8b": layer(*LLAMA_8B),
    "llama_8b_tp2": layer(*LLAMA_8B, devices=2),
    "llama_8b_tp4": layer(*LLAMA_8B, devices=4),
    "qwen3_06b": layer(*QWEN3_06B),
    "smollm2_135m": layer(*SMOLLM2_135M),
}
BENCHED_TOKENS = {"llama_8b": (1, 2, 8, 16, 32, 64, 128, 256)}  # of the others 1, 16 and 64

CASES = (
    Case("one_tile", 8, (64, 192), race_detection=True),
    Case("inputs_first_split", 24, (384, 64), inputs_first=True, race_detection=True),
    Case("gated_shards_two_tokens", 2, (2, 2, 64, 192), gated=True, bias=True),
    Case("odd_tokens_bias", 11, (2, 64, 128), bias=True),
    Case("fp16", 40, (64, 128), dtype="float16"),
    Case("odd_sizes", 5, (1, 2, 40, 100), gated=True),
    Case("one_token", 1, (128, 64), inputs_first=True, race_detection=True),
    Case("one_token_split", 1, (1536, 576), inputs_first=True, race_detection=True),
    Case("one_token_steps", 1, (1152, 64), inputs_first=True, dtype="float16"),
    Case("one_token_odd_sizes", 1, (100, 40), inputs_first=True),
    *(
        Case(f"b{tokens}_{model}_{product}", tokens, tags="bench", **keywords)
        for model, products in LAYERS.items()
        for product, keywords in products.items()
        for tokens in BENCHED_TOKENS.get(model, (1, 16, 64))
        if tokens > 1 or keywords.get("inputs_first")  # else it is a part of `norm_linear`
    ),
)


def inputs(case: Case, seed: int = 0, poison: float | None = None) -> tuple[tuple, dict]:
    """Return the arguments of `op.linear`; all of them are read, so nothing is poisoned."""
    del poison
    keys = jax.random.split(jax.random.key(seed), 3)
    size = case.weight[0 if case.inputs_first else -1]
    outputs = case.weight[1:] if case.inputs_first else case.weight[:-1]
    x = jax.random.normal(keys[0], (case.tokens, size), case.dtype)
    weight = jax.random.normal(keys[1], case.weight, case.dtype)
    weight = weight * jnp.asarray(size**-0.5, case.dtype)
    bias = (jax.random.normal(keys[2], outputs, case.dtype),) if case.bias else ()
    return (x, weight, *bias), {"gated": case.gated, "inputs_first": case.inputs_first}


def expected(case: Case, arguments: tuple, keywords: dict) -> np.ndarray:
    """Return the product in float64, one shard after another."""
    del keywords
    x, weight, *bias = (np.asarray(a).astype(np.float64) for a in arguments)
    product = np.tensordot(x, weight, (1, 0 if case.inputs_first else weight.ndim - 1))
    product += bias[0] if bias else 0
    if case.gated:
        gate, up = product[:, :, 0], product[:, :, 1]
        product = gate / (1 + np.exp(-gate)) * up
    return product.reshape(case.tokens, -1)


comparable = cases.finite


def following(arguments: tuple, output: jax.Array) -> tuple:
    """Return `arguments` with tokens that depend on the product, so that calls run in turn.

    They are equal nevertheless: tokens that went through many gates would be zeros, which take the
    chip less power.
    """
    x = arguments[0]
    return (x + 0 * jnp.resize(output, x.shape), *arguments[1:])


def cost(case: Case) -> tuple[float, float]:
    """Return the bytes that must be moved and the floating-point operations that must be done."""
    weight = float(np.prod(case.weight))
    size = case.weight[0 if case.inputs_first else -1]
    outputs = weight / size / (2 if case.gated else 1)
    elements = weight + case.tokens * (size + outputs)
    return elements * jnp.dtype(case.dtype).itemsize, 2.0 * case.tokens * weight
