"""What a user sets, and the numbers a model needs. Vocabulary; frozen, checked once, here.

`EngineConfig` is built once from keywords or the command line and handed whole to constructors.
What is derived from the hardware (the number of blocks) is a value of the runner, never written
back.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from arctic_jax.errors import UnsupportedModelError
from arctic_jax.speculative_config import SpeculativeConfig
from arctic_jax.structured_outputs import StructuredOutputsConfig

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base and, for long contexts, how its frequencies are scaled.

    `type` is one of `ROPE_TYPES`; the other fields mean what they mean in Hugging Face's
    `rope_parameters`.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Read `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

        Raises:
            UnsupportedModelError: the type is not one of `ROPE_TYPES`, or layers differ in it.
        """
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if any(isinstance(value, Mapping) for value in scaling.values()):
            raise UnsupportedModelError(f"rope_parameters differ between layers: {dict(scaling)}")
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"rope_type {kind!r} in rope_scaling is not supported; supported: {ROPE_TYPES}"
            )
        partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
        if partial != 1:
            raise UnsupportedModelError(f"partial_rotary_factor {partial} is not supported")
        known = {f.name for f in fields(cls)} - {"theta", "type"}
        values = {k: v for k, v in scaling.items() if k in known and v is not None}
        theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
        original = values.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings", config.get("max_position_embeddings", 0)
        )
        values["original_max_position_embeddings"] = int(original)
        return cls(theta=float(theta), type=kind, **values)


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: its sizes, and which layers have one instead of a dense feed-forward.

    Attributes:
        num_experts: of a layer.
        num_experts_per_tok: those that a token goes to.
        intermediate_size: of one expert.
        norm_topk_prob: whether the weights of a token's experts are made to sum to one.
        layers: indices of the layers that have experts.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UnsupportedModelError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and "
                f"num_experts {self.num_experts}"
            )


@dataclass(frozen=True)
class SwiftKVConfig:
    """Where a SwiftKV model narrows, and who holds keys and values above (arXiv 2410.03960).

    Attributes:
        num_key_value_layers: l; the layers that run on every token.
        key_value_group_size: g; so many neighbouring layers above share keys and values (AcrossKV).
    """

    num_key_value_layers: int
    key_value_group_size: int = 1


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder. `head_dim` need not be `hidden_size / num_attention_heads`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    """Keys each layer's queries see; `None` for all. Empty means `None` for every layer."""
    moe: MoEConfig | None = None
    swiftkv: SwiftKVConfig | None = None
    checkpoint_dtype: str = "float32"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> ModelConfig:
        """Read what all decoders share from a Hugging Face `config.json`; ignore unknown keys.

        Raises:
            UnsupportedModelError: a key is missing, or has a value that is not implemented.
        """
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method")
            raise UnsupportedModelError(f"quantization_config ({method=}) is not supported")
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModelError(f"hidden_act {activation!r} is not supported, only 'silu'")
        try:
            heads = int(config["num_attention_heads"])
            values: dict[str, Any] = {
                "architecture": (config.get("architectures") or ["?"])[0],
                "vocab_size": int(config["vocab_size"]),
                "hidden_size": int(config["hidden_size"]),
                "intermediate_size": int(config["intermediate_size"]),
                "num_hidden_layers": int(config["num_hidden_layers"]),
                "num_attention_heads": heads,
                "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
                "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
                "max_position_embeddings": int(config["max_position_embeddings"]),
            }
        except KeyError as error:
            raise UnsupportedModelError(f"the model's config has no key {error}") from error
        values["rope"] = RopeConfig.from_hf(config)
        values["rms_norm_eps"] = float(config.get("rms_norm_eps", 1e-6))
        values["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        values["checkpoint_dtype"] = dtype.removeprefix("torch.")
        model = cls(**(values | overrides))
        if model.num_attention_heads % model.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {model.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {model.num_key_value_heads}"
            )
        if model.checkpoint_dtype not in DTYPES:
            raise UnsupportedModelError(f"dtype {model.checkpoint_dtype!r} is not one of {DTYPES}")
        return model

    @property
    def num_lower_layers(self) -> int:
        """Layers that run on every token; those above run on the rows that need logits."""
        return self.swiftkv.num_key_value_layers if self.swiftkv else self.num_hidden_layers

    @property
    def key_value_group_size(self) -> int:
        """Upper layers that share keys and values, the first of which owns them."""
        return self.swiftkv.key_value_group_size if self.swiftkv else 1

    @property
    def num_cache_layers(self) -> int:
        """Layers that own keys and values in the cache."""
        upper = self.num_hidden_layers - self.num_lower_layers
        return self.num_lower_layers + upper // self.key_value_group_size

    def sliding_window(self, layer: int) -> int | None:
        """Return the window of a layer, `None` for full attention."""
        return self.sliding_windows[layer] if self.sliding_windows else None


@dataclass(frozen=True)
class LoadConfig:
    """Which model, and in what form it is loaded."""

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    """`auto`: float32 on a CPU; else the checkpoint's, with bfloat16 for float32. For embeddings
    bfloat16, but float32 on a CPU that does not multiply it."""
    load_format: Literal["auto", "dummy"] = "auto"
    max_model_len: int | None = None
    implementation: str | None = None
    """Of every operation in `pallas_kernels`; `None` for the best one here."""
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, ("auto", *DTYPES))
        _one_of("load_format", self.load_format, ("auto", "dummy"))
        _positive("max_model_len", self.max_model_len)
        _integer("seed", self.seed)


@dataclass(frozen=True)
class ParallelConfig:
    """How many engines there are, and how each is spread over P = tensor · Ulysses devices."""

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    ulysses_sequence_parallel_size: int = 1
    enable_shift_parallel: bool = True
    """With Ulysses: steps of few tokens split the weights over all devices instead."""
    shift_parallel_threshold: int | None = None
    """Most tokens of such a step; `None`: measured at the first start."""
    disable_custom_all_reduce: bool = False
    """Have NCCL sum the results of few tokens over the devices, too."""
    nnodes: int = 1
    """Machines that the devices are spread over, a process each."""
    node_rank: int = 0
    """Which of them this one is. Node 0 has the requests, the others follow it."""
    master_addr: str = "127.0.0.1"
    """Address of node 0, on which it listens for the others."""
    master_port: int = 29501

    def __post_init__(self) -> None:
        _positive("nnodes", self.nnodes)
        _integer("node_rank", self.node_rank)
        _positive("master_port", self.master_port)
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"node_rank must be 0 to {self.nnodes - 1} with nnodes={self.nnodes}, "
                f"got {self.node_rank}"
            )
        if self.nnodes > 1 and self.data_parallel_size > 1:
            raise ValueError(
                f"data_parallel_size={self.data_parallel_size} does not go with "
                f"nnodes={self.nnodes}: each engine has machines of its own"
            )
        _positive("data_parallel_size", self.data_parallel_size)
        _positive("tensor_parallel_size", self.tensor_parallel_size)
        _positive("ulysses_sequence_parallel_size", self.ulysses_sequence_parallel_size)
        if self.shift_parallel_threshold is not None:
            _integer("shift_parallel_threshold", self.shift_parallel_threshold)
            if self.shift_parallel_threshold < 0:
                raise ValueError(
                    "shift_parallel_threshold must not be negative, got "
                    f"{self.shift_parallel_threshold}"
                )

    @property
    def num_devices(self) -> int:
        """Devices of one engine."""
        return self.tensor_parallel_size * self.ulysses_sequence_parallel_size


@dataclass(frozen=True)
class CacheConfig:
    """The paged key/value cache."""

    block_size: int = 64
    num_blocks: int | None = None
    """`None`: as many as fit into the memory share below."""
    gpu_memory_utilization: float = 0.92
    """Share of a GPU's memory for weights, cache and working space together."""
    cpu_memory_share: float = 0.1
    """Share of the machine's memory for the cache, on a CPU."""
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _positive("block_size", self.block_size)
        _positive("num_blocks", self.num_blocks)
        for name in ("gpu_memory_utilization", "cpu_memory_share"):
            share = getattr(self, name)
            if isinstance(share, str | bool | None) or not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share!r}")


@dataclass(frozen=True)
class SchedulerConfig:
    """What one step may hold."""

    max_num_seqs: int | None = None
    """Requests that run at once; `None`: 256, on a CPU 16."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step, prompts and decode together; `None`: 8192, on a CPU 1024."""
    max_num_mixed_tokens: int | None = None
    """Tokens of one step in which answers are streamed, so that long prompts of others do not
    stall them; prompts get at least half of it. `None`: 512 for each GPU, on a CPU 256."""
    num_scheduler_steps: int | None = None
    """How often one launch goes through the model while all sequences only decode and nobody waits
    to be taken in; what it draws reaches the users together. `None`: 4 for models so small that a
    GPU is done before the host has launched the next step, else, and beside a speculator or draft
    model, 1. Where the host makes drafts it must be 1."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    max_logprobs: int = 20
    step_log: str | None = None
    """File that gets a line of JSON for every step: layout, tokens, milliseconds."""

    def __post_init__(self) -> None:
        _positive("max_num_seqs", self.max_num_seqs)
        _positive("max_num_batched_tokens", self.max_num_batched_tokens)
        _positive("max_num_mixed_tokens", self.max_num_mixed_tokens)
        _positive("num_scheduler_steps", self.num_scheduler_steps)
        _one_of("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        _integer("max_logprobs", self.max_logprobs)
        if self.max_logprobs < 0:
            raise ValueError(f"max_logprobs must not be negative, got {self.max_logprobs}")

    def limits(self, backend: str, num_devices: int = 1) -> StepLimits:
        """Fill in the limits whose default depends on where the engine runs ("cpu", "gpu").

        Several GPUs compute as many times the prompt tokens while a stream waits for its next.
        """
        default = StepLimits(256, 8192, 512 * num_devices)
        if backend == "cpu":
            default = StepLimits(16, 1024, 256)
        given = {f.name: getattr(self, f.name) for f in fields(StepLimits)}
        limits = replace(default, **{name: n for name, n in given.items() if n is not None})
        most = min(limits.max_num_mixed_tokens, limits.max_num_batched_tokens)
        return replace(limits, max_num_mixed_tokens=most)


@dataclass(frozen=True)
class StepLimits:
    """What one step may hold, see `SchedulerConfig`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_mixed_tokens: int


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine is built from."""

    load: LoadConfig = field(default_factory=LoadConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    structured_outputs: StructuredOutputsConfig = field(default_factory=StructuredOutputsConfig)

    @classmethod
    def from_keywords(cls, **keywords: Any) -> EngineConfig:
        """Build from the flat names that `LLM(...)` and the command line use.

        `speculative_config` is a dictionary or its JSON, see `SpeculativeConfig.from_user`.
        Options of vLLM's that have no counterpart because nothing depends on them are let pass.

        Raises:
            TypeError: a name is unknown.
            ValueError: a value is out of range.
        """
        if keywords.get("seed", 0) is None:
            del keywords["seed"]
        parts: dict[str, Any] = {
            "speculative": SpeculativeConfig.from_user(keywords.pop("speculative_config", None))
        }
        for part, kind in _PARTS.items():
            names = [f.name for f in fields(kind)]
            parts[part] = kind(**{n: keywords.pop(n) for n in names if n in keywords})
        for name in _WITHOUT_EFFECT & keywords.keys():
            logger.warning("%s=%r has no effect here", name, keywords.pop(name))
        if keywords:
            raise TypeError(f"unknown engine option(s): {', '.join(sorted(keywords))}")
        return cls(**parts)


# Every step is one program and prompts are always chunked; code of a model's repository never runs.
_WITHOUT_EFFECT = {
    "disable_custom_all_reduce",
    "disable_log_stats",
    "enable_chunked_prefill",
    "enforce_eager",
    "swap_space",
    "tokenizer_mode",
    "trust_remote_code",
}

_PARTS = {
    "load": LoadConfig,
    "parallel": ParallelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "structured_outputs": StructuredOutputsConfig,
}


def _positive(name: str, value: int | None) -> None:
    if value is not None:
        _integer(name, value)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
