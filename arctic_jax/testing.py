"""Small models and a small tokenizer, made on the spot and alike everywhere; for tests.

Needs neither a network nor torch. The weights depend only on the config, the seed and the tensor's
name, so that a test can make again the very checkpoint whose logits were stored.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from arctic_jax.errors import UnsupportedModelError

TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|eos|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TINY_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
TINY_VOCAB_SIZE = 256 + len(TINY_SPECIAL_TOKENS)
TINY_EOS_TOKEN_ID = 257
TINY_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": TINY_VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": TINY_EOS_TOKEN_ID,
    "torch_dtype": "float32",
}
"""The config of a Llama whose vocabulary is `write_tokenizer`'s; dividable over eight devices."""


def write_model(
    directory: str | Path, config: Mapping[str, Any] = TINY_LLAMA, seed: int = 0
) -> Path:
    """Write a whole model, weights and tokenizer; return the directory."""
    write_checkpoint(directory, config, seed)
    return write_tokenizer(directory)


def write_checkpoint(directory: str | Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """Write `config.json` and `model.safetensors` (float32) for a Hugging Face config.

    Raises:
        UnsupportedModelError: the architecture is not one whose tensors are known here.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", "utf-8")
    save_file(
        make_tensors(config, seed), directory / "model.safetensors", metadata={"format": "pt"}
    )
    return directory


def make_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Make the tensors of a checkpoint of this config, float32, by their names."""
    return {name: _tensor(name, shape, seed) for name, shape in tensor_shapes(config).items()}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this config holds."""
    architecture = config["architectures"][0]
    if architecture in _ENCODERS:
        return _encoder_shapes(config)
    if architecture not in _BIASED:
        known = ", ".join([*_BIASED, *_ENCODERS])
        raise UnsupportedModelError(f"{architecture!r} is not one of {known}")
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, kv_heads * head_dim
    projections = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
    }
    dense = {
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    biased = _BIASED[architecture]
    if config.get("attention_bias"):
        biased |= projections.keys()
    if config.get("mlp_bias"):
        biased |= dense.keys()
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if architecture.startswith("Qwen3"):
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        matrices = projections | (_mixture_shapes(config, layer) or dense)
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{prefix}{name}.bias": matrices[name][:1] for name in sorted(biased)}
        shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
    return _with_swiftkv(shapes, config) if "SwiftKV" in architecture else shapes


def _with_swiftkv(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Replace the projections of the upper layers; keys and values only where a group begins."""
    lower, group = config["num_key_value_layers"], config.get("key_value_group_size", 1)
    changed: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"(model\.layers\.(\d+)\.self_attn\.([qkv])_proj)\.(\w+)", name)
        if not match or int(match[2]) < lower:
            changed[name] = shape
        elif match[3] == "q" or (int(match[2]) - lower) % group == 0:
            changed[f"{match[1]}_swiftkv.{match[4]}"] = shape
    return changed | {"model.norm_swiftkv.weight": (config["hidden_size"],)}


def _mixture_shapes(config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """Return the matrices of a layer's router and experts; none of a dense layer."""
    sparse = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    if not config.get("num_experts") or layer in config.get("mlp_only_layers", ()) or not sparse:
        return {}
    hidden, ffn = config["hidden_size"], config["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate": (config["num_experts"], hidden)}
    for expert in range(config["num_experts"]):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (ffn, hidden)
        shapes[f"mlp.experts.{expert}.up_proj"] = (ffn, hidden)
        shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, ffn)
    return shapes


_ENCODERS = ("BertModel", "RobertaModel", "XLMRobertaModel")


def _encoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of BERT and its like."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
        matrices = {
            "attention.self.query": (hidden, hidden),
            "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (ffn, hidden),
            "output.dense": (hidden, ffn),
        }
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes | {f"{name}.{kind}": (hidden,) for name in norms for kind in ("weight", "bias")}


_QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_BIASED = {  # projections with a bias whatever the config says
    "LlamaForCausalLM": frozenset[str](),
    "MistralForCausalLM": frozenset[str](),
    "Qwen2ForCausalLM": _QKV,
    "Qwen3ForCausalLM": frozenset[str](),
    "Qwen3MoeForCausalLM": frozenset[str](),
    "LlamaSwiftKVForCausalLM": frozenset[str](),
    "Qwen2SwiftKVForCausalLM": _QKV,
}


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    # RandomState's stream is frozen, and `random_sample` is integer arithmetic: the same bits on
    # every machine and under every version of numpy.
    random = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))
    values = (2 * random.random_sample(shape) - 1) * math.sqrt(3)  # deviation 1
    if len(shape) == 1:
        # Norms differ from one and biases from zero, or leaving them out would go unnoticed.
        values = 0.3 * values + (1 if "norm" in name or name.endswith("LayerNorm.weight") else 0)
    elif "embed" not in name:
        # Sharper attention than an untrained model's: a wrong position or mask must show.
        gain = 1.5 if re.search("q_proj|k_proj|query|key", name) else 1.0
        values *= gain / math.sqrt(shape[1])
    return values.astype(np.float32)


def write_tokenizer(directory: str | Path) -> Path:
    """Write a tokenizer whose ids are bytes, with five special tokens and a chat template."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = _byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in TINY_SPECIAL_TOKENS]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TINY_CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return directory


def _byte_alphabet() -> list[str]:
    """Return the letter by which byte-level vocabularies write each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    stem, _, kind = name.rpartition(".")
    if match := re.match(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{match[1]}.{_GGUF_NAMES[match[2]]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def write_gguf(
    path: str | Path,
    directory: str | Path,
    kind: str = "F32",
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray[Any, Any]] | None = None,
    encode: Callable[[np.ndarray[Any, Any], Any], np.ndarray[Any, Any]] = gguf.quantize,
) -> Path:
    """Write what `write_checkpoint` or `write_model` wrote as one GGUF file.

    Args:
        path: The file.
        directory: With `config.json` and `model.safetensors`, and `tokenizer.json` if it has one.
        kind: How matrices are quantized: the name of a `gguf.GGMLQuantizationType`.
        keys: More metadata, or other values than the config's (`None`: left out); names as in the
            file, without the architecture in front.
        extra: More tensors.
        encode: Quantizes a matrix.
    """
    path, directory = Path(path), Path(directory)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    architecture = "llama" if config["model_type"] == "mistral" else config["model_type"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    stated: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    } | dict(keys or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in stated.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    if (directory / "tokenizer.json").exists():
        _add_tokenizer(writer, directory)
    for key, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        if f"{key}_token_id" in config:
            add(config[f"{key}_token_id"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        if architecture == "llama" and (match := re.search(r"([qk])_proj", name)):
            tensor = _interleave(tensor, heads if match[1] == "q" else kv_heads)
        if tensor.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), tensor)
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(name), encode(tensor, number), raw_dtype=number)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(tensor: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Permute q/k rows as llama.cpp's converter does for its `llama` architecture."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(tensor.shape))


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    model = tokenizer["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = [token["content"] for token in tokenizer["added_tokens"]]
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + special)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template(config["chat_template"])
