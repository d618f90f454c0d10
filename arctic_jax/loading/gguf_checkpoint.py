"""A GGUF file as a `Checkpoint` in Hugging Face's names and orientation. Host only.

Rows are dequantized when they are read, and no others. llama.cpp stores the q/k rows of its
`llama` architecture interleaved for its rotary embedding; they are put back on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from arctic_jax.errors import CheckpointError, UnsupportedModelError
from arctic_jax.loading.gguf_file import GGUFFile
from arctic_jax.weights import ALL_ROWS

_Type = GGMLQuantizationType
# Read as they are; every other type is dequantized to float32.
_PLAIN = {_Type.F32: np.float32, _Type.F16: np.float16, _Type.BF16: ml_dtypes.bfloat16}
_QUANTIZED = (_Type.Q4_0, _Type.Q4_1, _Type.Q5_0, _Type.Q8_0, _Type.Q4_K, _Type.Q5_K, _Type.Q6_K)
QUANTIZATIONS = tuple(kind.name for kind in (*_PLAIN, *_QUANTIZED))
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # with a sliding window: MistralForCausalLM
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_ROPE_FACTORS = "rope_freqs.weight"
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that change the computation in a way that no model here implements, unless they are neutral.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
}


class GGUFCheckpoint:
    """See `arctic_jax.weights.Checkpoint`; quantized tensors are read as float32.

    Raises:
        CheckpointError: the file is damaged or truncated.
        UnsupportedModelError: the architecture, a tensor's name or its type is not implemented.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = GGUFFile(path)
        self._metadata = self.file.metadata
        self._architecture = str(self._metadata.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"general.architecture {self._architecture!r} of {self.file.path.name} is not "
                f"supported; supported: {', '.join(ARCHITECTURES)}"
            )
        if self._metadata.get("split.count", 1) != 1:
            raise UnsupportedModelError(
                f"{self.file.path.name} is one of {self._metadata['split.count']} parts; merge them"
            )
        self._names: dict[str, str] = {}
        for stored, info in self.file.tensors.items():
            if stored == _ROPE_FACTORS:
                continue
            if info.type.name not in QUANTIZATIONS:
                raise UnsupportedModelError(
                    f"tensor {stored!r} is quantized as {info.type.name}, which is not one of "
                    f"{', '.join(QUANTIZATIONS)}"
                )
            self._names[_hf_name(stored)] = stored
        self._config = self._read_config()
        self._head_dim = self._config["head_dim"]

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.file.tensors[self._stored(name)].shape

    def read(
        self, name: str, rows: slice = ALL_ROWS, columns: slice = ALL_ROWS
    ) -> np.ndarray[Any, Any]:
        """Read and dequantize `tensor[rows]`, or `tensor[rows, columns]`, and nothing else."""
        stored = self._stored(name)
        info = self.file.tensors[stored]
        if len(info.shape) == 1:
            if columns != ALL_ROWS:
                raise ValueError(f"{name!r} has one dimension, {columns=}")
            values = self._values(stored, slice(0, 1), ALL_ROWS)[0]  # a vector is one stored row
            return values[self._stored_rows(name, rows)]
        return self._values(stored, self._stored_rows(name, rows), columns)

    def config(self) -> dict[str, Any]:
        """Return what the file says of the model, as a Hugging Face `config.json` would."""
        return dict(self._config)

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"{self.file.path} has no tensor {name!r}")
        return self._names[name]

    def _values(
        self, stored: str, rows: slice | np.ndarray[Any, Any], columns: slice
    ) -> np.ndarray[Any, Any]:
        info = self.file.tensors[stored]
        raw = self.file.rows(stored)
        block, size = GGML_QUANT_SIZES[info.type]
        start, stop, step = columns.indices(info.shape[-1])
        first, last = start // block, -(-stop // block)  # whole blocks around the columns
        raw = np.ascontiguousarray(raw[rows, first * size : max(last, first) * size])
        if not raw.size:  # which the library cannot dequantize
            return np.zeros((len(raw), 0 if len(raw) else max(stop - start, 0)), np.float32)
        plain = _PLAIN.get(info.type)
        values = dequantize(raw, info.type) if plain is None else raw.view(plain)
        return values[:, start - first * block : max(stop, start) - first * block : step]

    def _stored_rows(self, name: str, rows: slice) -> slice | np.ndarray[Any, Any]:
        if self._architecture != "llama" or not re.search(r"\.[qk]_proj\.", name):
            return rows
        count, half = self.shape(name)[0], self._head_dim // 2
        if count % (2 * half):
            raise CheckpointError(f"{name!r} has {count} rows, heads of {2 * half}")
        wanted = np.arange(*rows.indices(count))
        head, row = np.divmod(wanted, 2 * half)
        side, pair = np.divmod(row, half)  # HF: the two halves of a head; llama.cpp: pairs
        return head * 2 * half + 2 * pair + side

    def _get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}", default)

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if value is None:
            raise UnsupportedModelError(f"the file has no key {self._architecture}.{key}")
        if isinstance(value, list):
            if any(one != value[0] for one in value):
                raise UnsupportedModelError(
                    f"{self._architecture}.{key} differs between layers: {value[:8]}"
                )
            value = value[0] if value else None
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self._architecture}.{key} is {value!r}, not a positive number")
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or not value > 0:
            raise CheckpointError(f"{self._architecture}.{key} is {value!r}, not a positive number")
        # What was meant by a number that is stored as float32: 1e-05, not 9.99…e-06.
        return float(str(np.float32(value)))

    def _read_config(self) -> dict[str, Any]:
        for key, neutral in _NEUTRAL.items():
            if self._get(key, neutral[0]) not in neutral:
                raise UnsupportedModelError(
                    f"{self._architecture}.{key} {self._get(key)!r} is not supported"
                )
        hidden, heads = self._integer("embedding_length"), self._integer("attention.head_count")
        head_dim = self._integer("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (value := self._get(key, head_dim)) != head_dim:
                raise UnsupportedModelError(
                    f"{self._architecture}.{key} {value} differs from the key length {head_dim}"
                )
        context = self._integer("context_length")
        config = {
            "architectures": [ARCHITECTURES[self._architecture]],
            "model_type": self._architecture,
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "lm_head.weight" not in self,
            "rope_parameters": self._rope(context, head_dim),
            "dtype": self._dtype(),
        }
        if self._architecture == "llama":
            config |= self._biases()
        stated = self._get("attention.sliding_window")  # absent or 0: none
        window = self._integer("attention.sliding_window") if stated else context
        if window < context:
            if self._architecture != "llama":
                # The file does not say which layers have it.
                raise UnsupportedModelError(
                    f"{self._architecture}.attention.sliding_window {window} is not supported"
                )
            config |= {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": window,
            }
        return config | token_ids(self._metadata)

    def _biases(self) -> dict[str, bool]:
        found = {}
        for key, projections in (
            (
                "attention_bias",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            ),
            ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        ):
            has = {p: f"model.layers.0.{p}.bias" in self for p in projections}
            if len(set(has.values())) != 1:
                raise UnsupportedModelError(f"{key} of only some projections: {has}")
            found[key] = has[projections[0]]
        return found

    def _dtype(self) -> str:
        kinds = {info.type for info in self.file.tensors.values() if len(info.shape) > 1}
        names = {_Type.F16: "float16", _Type.BF16: "bfloat16"}
        return names.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"

    def _rope(self, context: int, head_dim: int) -> dict[str, Any]:
        rope: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": self._float("rope.freq_base", 10000.0),
        }
        kind = self._get("rope.scaling.type", "none")
        factor = self._float("rope.scaling.factor", 1.0)
        if self._get("rope.scale_linear"):  # how older files spell it
            kind, factor = "linear", self._float("rope.scale_linear")
        if _ROPE_FACTORS in self.file.tensors:
            if kind != "none":
                raise UnsupportedModelError(f"{_ROPE_FACTORS} together with rope scaling {kind!r}")
            factors = self._values(_ROPE_FACTORS, slice(0, 1), ALL_ROWS)[0]
            return rope | llama3_scaling(np.asarray(factors), rope["rope_theta"], head_dim)
        if kind == "none" or (kind == "linear" and factor == 1.0):
            return rope
        if kind == "linear":
            return rope | {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            if self._get("rope.scaling.attn_factor", 1.0) != 1.0:
                raise UnsupportedModelError(f"{self._architecture}.rope.scaling.attn_factor")
            original = self._integer("rope.scaling.original_context_length", context)
            rope |= {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            }
            for beta in ("beta_fast", "beta_slow"):
                if self._get(f"rope.scaling.yarn_{beta}") is not None:
                    rope[beta] = self._float(f"rope.scaling.yarn_{beta}")
            return rope
        raise UnsupportedModelError(
            f"{self._architecture}.rope.scaling.type {kind!r} is not supported"
        )


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return `bos_token_id`, `eos_token_id` (a list if turns end otherwise), `pad_token_id`."""
    ids = {}
    for key, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if (value := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            ids[name] = int(value)
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    ends = list(dict.fromkeys(int(end) for end in ends if end is not None))
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return ids


def llama3_scaling(factors: np.ndarray[Any, Any], theta: float, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3's rope parameters from the divisors of each frequency that a file stores.

    Between its two thresholds `1 / divisor` is linear in the frequency, so two unknowns follow from
    a line; the third only scales the other two, and `low_freq_factor` is 1 in every such model.

    Raises:
        UnsupportedModelError: these are not the divisors of such a scaling.
    """
    refused = UnsupportedModelError(
        f"{_ROPE_FACTORS} {np.round(factors, 3).tolist()} is not a llama3 rope scaling"
    )
    factors = np.asarray(factors, np.float64)
    if factors.shape != (head_dim // 2,) or not np.all(np.isfinite(factors) & (factors >= 1)):
        raise refused
    factor = float(factors.max())
    if factor == 1.0:
        return {}
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)  # per position
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if between.sum() < 2:
        raise refused
    slope, offset = np.polyfit(turns[between], smooth[between], 1)
    if offset >= 0:
        raise refused
    high = round(1 - 1 / offset, 3)
    original = round(slope * (high - 1))
    expected = np.clip((original * turns - 1) / (high - 1), 0, 1)
    expected = 1 / ((1 - expected) / factor + expected)
    if not np.allclose(expected, factors, rtol=1e-3):
        raise refused
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _hf_name(stored: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored)
    if match:
        layer, part, kind = match.groups()
        name = (_TOP_NAMES if layer is None else _LAYER_NAMES).get(part)
        if name is not None:
            prefix = "" if layer is None else f"model.layers.{layer}."
            return f"{prefix}{name}.{kind}"
    raise UnsupportedModelError(f"tensor {stored!r} belongs to no supported architecture")
