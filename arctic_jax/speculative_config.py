"""What a user sets about speculative decoding. Vocabulary; frozen, checked once, here.

The keys of `speculative_config` are Arctic Inference's and vLLM's, so that both kinds of users keep
what they have.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

logger = logging.getLogger(__name__)

METHODS = ("suffix", "ngram", "arctic", "mlp_speculator", "draft_model")
MAX_DRAFT_LEN = 128
MAX_TREE_LEN = 31
"""Most tokens of a draft that is a tree: what a token sees of it is a word of bits."""
_DEFAULT_DRAFT_LEN = {"suffix": 16, "ngram": 4}
_DEFAULT_ON_DEVICE = 15  # with the token before them 16 rows, a shape that there is
_ON_DEVICE = {"arctic": "speculator", "mlp_speculator": "speculator", "draft_model": "draft model"}
# vLLM's names for what Arctic named first.
_ALIASES = {
    "suffix_decoding_max_tree_depth": "suffix_cache_max_depth",
    "suffix_decoding_max_cached_requests": "suffix_cache_max_requests",
    "suffix_decoding_max_spec_factor": "suffix_max_spec_factor",
    "suffix_decoding_min_token_prob": "suffix_min_token_prob",
    "use_tree_spec": "suffix_use_tree_spec",  # the name in `SuffixDecodingCache.speculate`
}


@dataclass(frozen=True)
class SpeculativeConfig:
    """Who drafts, how much, and when nobody does.

    Attributes:
        method: one of `METHODS`; `None` to switch speculation off, unless `enable_suffix_decoding`.
        model: the speculator of `arctic` and `mlp_speculator`, which mean the same, or the smaller
            language model of `draft_model`; others ignore it.
        revision: of it, on the hub.
        num_speculative_tokens: most tokens of a draft; by default 16 (`suffix`, 15 on the device),
            4 (`ngram`, `draft_model`), or what the speculator was made for.
        enable_suffix_decoding: with a model, its drafts are for where suffix decoding is not sure
            of itself; without a method, this is the method `suffix`.
        disable_by_batch_size: of a step of more requests only the first so many draft.
        hard_disable_by_batch_size: in a step of so many requests nobody drafts.
        adaptive: whether a request's drafts become shorter, rarer, and again longer, with what
            came of the last ones.
        suffix_cache_max_depth: the longest match plus draft, in tokens.
        suffix_cache_max_requests: responses in the global trees, which make drafts for one request
            out of what others were told; 0 switches that off, -1 is without limit.
        suffix_speculative_tokens: most tokens of a suffix draft; if 0, `num_speculative_tokens`,
            beside a model's drafts `suffix_cache_max_depth`.
        suffix_max_spec_factor: most drafted tokens for each token matched ...
        suffix_max_spec_offset: ... and beside those.
        suffix_min_token_prob: tokens less probable are not drafted.
        suffix_on_device: look for what came before in the request itself, on the device and within
            the step, so that no step waits for the host. Other responses are not looked at, and
            drafts are no trees. By default on GPUs, unless `suffix_use_tree_spec`.
        suffix_use_tree_spec: draft trees of the likeliest tokens, of at most `MAX_TREE_LEN`, not
            the likeliest path.
        prompt_lookup_max: longest sequence of tokens that `ngram` looks for, by default 5.
        prompt_lookup_min: shortest one, by default the longest.
    """

    method: str | None = None
    model: str | None = None
    revision: str | None = None
    num_speculative_tokens: int | None = None
    enable_suffix_decoding: bool = False
    disable_by_batch_size: int = 64
    hard_disable_by_batch_size: int | None = None
    adaptive: bool = True
    suffix_cache_max_depth: int = 64
    suffix_cache_max_requests: int = 100_000
    suffix_speculative_tokens: int = 0
    suffix_max_spec_factor: float = 1.0
    suffix_max_spec_offset: float = 0.0
    suffix_min_token_prob: float = 0.1
    suffix_on_device: bool | None = None
    suffix_use_tree_spec: bool = False
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: with the key and its value.
        """
        if self.method not in (None, *METHODS):
            raise ValueError(
                f"speculative_config: method {self.method!r} is not supported; "
                f"supported: {', '.join(METHODS)}"
            )
        if self.method == "ngram" and self.enable_suffix_decoding:
            raise ValueError(
                "speculative_config: enable_suffix_decoding cannot be combined with method 'ngram'"
            )
        needed = _ON_DEVICE.get(self.method or "")
        if needed and not self.model:
            raise ValueError(
                f"speculative_config: method {self.method!r} needs a {needed}, give its model"
            )
        for name in ("model", "revision"):
            if not isinstance(getattr(self, name), str | None):
                _refuse(name, getattr(self, name), "must be a name")
        if not isinstance(self.suffix_on_device, bool | None):
            _refuse("suffix_on_device", self.suffix_on_device, "must be true or false")
        for name in ("enable_suffix_decoding", "adaptive", "suffix_use_tree_spec"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "must be true or false")
        self._check_integer("num_speculative_tokens", 1, MAX_DRAFT_LEN)
        self._check_integer("suffix_speculative_tokens", 0, MAX_DRAFT_LEN)
        self._check_integer("disable_by_batch_size", 1)
        self._check_integer("hard_disable_by_batch_size", 1)
        self._check_integer("suffix_cache_max_depth", 1)
        self._check_integer("suffix_cache_max_requests", -1, 2**31 - 1)
        self._check_integer("prompt_lookup_max", 1)
        self._check_integer("prompt_lookup_min", 1)
        for name in ("suffix_max_spec_factor", "suffix_max_spec_offset", "suffix_min_token_prob"):
            value = getattr(self, name)
            if isinstance(value, bool | str) or value is None or not math.isfinite(value):
                _refuse(name, value, "must be a finite number")
        if self.suffix_on_device and not self.uses_suffixes:
            _refuse("suffix_on_device", True, "must be false without suffix decoding")
        self._check_trees()
        shortest, longest = self.lookup_lengths
        if shortest > longest:
            _refuse("prompt_lookup_min", shortest, f"must be at most prompt_lookup_max={longest}")
        hard = self.hard_disable_by_batch_size
        if hard is not None and hard <= self.disable_by_batch_size:
            logger.warning(
                "hard_disable_by_batch_size=%d is not above disable_by_batch_size=%d, which "
                "therefore has no effect",
                hard,
                self.disable_by_batch_size,
            )

    @classmethod
    def from_user(cls, given: Mapping[str, Any] | str | None) -> SpeculativeConfig:
        """Read a dictionary or its JSON; `None` is without speculation.

        Raises:
            ValueError: it is neither, a key is unknown, or a value is out of range.
        """
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"speculative_config is not JSON: {error}") from error
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ValueError(f"speculative_config must be a dictionary, got {given!r:.200}")
        values = {_ALIASES.get(key, key): value for key, value in given.items()}
        if len(values) < len(given):
            raise ValueError(f"speculative_config names a setting twice: {sorted(given)}")
        known = {field.name for field in fields(cls)}
        # Another method's keys are no mistake of their own: the method is what is refused.
        unknown = values.keys() - known
        if unknown and values.get("method") in (None, *METHODS):
            raise ValueError(f"speculative_config: unknown key(s) {', '.join(sorted(unknown))}")
        config = cls(**{key: values[key] for key in values.keys() & known})
        if config.kind is None:
            raise ValueError(f"speculative_config names no method; supported: {', '.join(METHODS)}")
        return config

    @property
    def kind(self) -> str | None:
        """The method in effect."""
        return "suffix" if self.method is None and self.enable_suffix_decoding else self.method

    @property
    def max_draft_len(self) -> int:
        """Most tokens of a draft; 0 if there is no speculation."""
        if self.kind is None:
            return 0
        if self.drafts_on_device:
            if self.suffix_on_device:
                return self.num_drafted_on_device
            short = self.num_drafted_on_device
            return max(short, self._longest_of_hybrid) if self.is_hybrid else short
        given = self.kind == "suffix" and self.suffix_speculative_tokens
        return given or self.num_speculative_tokens or _DEFAULT_DRAFT_LEN[self.kind]

    @property
    def drafts_on_device(self) -> bool:
        """Whether drafts are made within the step."""
        return self.method in _ON_DEVICE or bool(self.suffix_on_device)

    @property
    def drafts_on_host(self) -> bool:
        """Whether drafts are made by the host, too, or only by it."""
        return (self.kind == "ngram" or self.uses_suffixes) and not self.suffix_on_device

    @property
    def uses_suffixes(self) -> bool:
        """Whether there is suffix decoding, alone or beside a network."""
        return self.kind == "suffix" or self.is_hybrid

    def on(self, platform: str) -> SpeculativeConfig:
        """Return what is meant on "gpu" or "cpu" where the user left it open."""
        if self.suffix_on_device is not None:
            return self
        on_device = platform == "gpu" and self.uses_suffixes and not self.suffix_use_tree_spec
        return replace(self, suffix_on_device=on_device)

    @property
    def is_hybrid(self) -> bool:
        """Whether suffix decoding goes first, and the network drafts where it is not sure."""
        return self.method in _ON_DEVICE and self.enable_suffix_decoding

    @property
    def num_drafted_on_device(self) -> int:
        """Tokens of its drafts; 0 while it is not known what a network was made for."""
        if self.suffix_on_device:
            return self.num_matched_on_device
        return self.num_speculative_tokens or 0

    @property
    def num_matched_on_device(self) -> int:
        """Most tokens of a draft by suffix decoding on the device."""
        given = self.num_speculative_tokens if self.kind == "suffix" else None
        return self.suffix_speculative_tokens or given or _DEFAULT_ON_DEVICE

    @property
    def _longest_of_hybrid(self) -> int:
        most = MAX_TREE_LEN if self.suffix_use_tree_spec else MAX_DRAFT_LEN
        return self.suffix_speculative_tokens or min(self.suffix_cache_max_depth, most)

    @property
    def lookup_lengths(self) -> tuple[int, int]:
        """The shortest and the longest sequence of tokens that `ngram` looks for."""
        longest = self.prompt_lookup_max or self.prompt_lookup_min or 5
        return self.prompt_lookup_min or longest, longest

    def _check_trees(self) -> None:
        if not self.suffix_use_tree_spec:
            return
        if not self.uses_suffixes:
            _refuse("suffix_use_tree_spec", True, "must be false without suffix decoding")
        if self.suffix_on_device:
            _refuse("suffix_use_tree_spec", True, "must be false with suffix_on_device")
        if self.method == "draft_model":  # it goes on where the known tokens end in the cache
            _refuse("suffix_use_tree_spec", True, "must be false beside a draft model")
        for name in ("num_speculative_tokens", "suffix_speculative_tokens"):
            if (getattr(self, name) or 0) > MAX_TREE_LEN:
                most = f"must be at most {MAX_TREE_LEN} with suffix_use_tree_spec"
                _refuse(name, getattr(self, name), most)

    def _check_integer(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        if value is None and type(self).__dataclass_fields__[name].default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            _refuse(name, value, "must be an integer")
        elif value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"between {least} and {most}"
            _refuse(name, value, f"must be {limits}")


def _refuse(name: str, value: object, why: str) -> None:
    raise ValueError(f"speculative_config: {name} {why}, got {value!r:.200}")
