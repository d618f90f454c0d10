"""What the speculators share: their config, their constants, their norm, and the chain of heads.

Pure; runs inside the step program. A speculator is a small recurrent network beside a model: from
the model's last hidden state and the token drawn from it, head k guesses the k-th token after that
(Wertheimer et al. 2024, arXiv 2404.19124; Arctic's LSTM: arXiv 2507.11830). Its checkpoints are
Snowflake's and IBM's; two keys of ours let a small one use the model's own vocabulary matrices, a
third leaves the heads of a large one the tokens that are frequent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from arctic_jax.config import ModelConfig
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.models.layers import Embed, parameter
from arctic_jax.shift_parallel import MeshLayout
from arctic_jax.weights import Rows, Source

EPSILON = 1e-6
DRAFT_TOKEN_IDS = "draft_token_ids"
"""Of a checkpoint's tensors, the one that says which token each row of the heads stands for."""
State = tuple[Array, ...]


@dataclass(frozen=True)
class SpeculatorConfig:
    """The numbers of a speculator.

    Attributes:
        architecture: its name in the config.
        input_size: of the model's hidden states.
        inner_size: of its own.
        vocab_size: as the model's.
        n_predict: heads, and so tokens of a draft.
        tie_weights: whether the heads share their weights, but for the first projection.
        tie_gates: whether the gates of an LSTM share one embedding (`tie_lstm_embs`).
        scale_input: whether the hidden state is normalised first.
        shares_embedding: tokens are embedded by the model's embedding and a projection
            (`share_base_embedding`, a key of ours).
        shares_head: logits come from a projection and the model's head (`share_base_head`, ours).
        draft_vocab_size: rows of the heads, if they know some of the tokens only (a key of ours).
        base_architectures: of the models that it was made for; empty if it does not say.
    """

    architecture: str
    input_size: int
    inner_size: int
    vocab_size: int
    n_predict: int
    tie_weights: bool = True
    tie_gates: bool = True
    scale_input: bool = False
    shares_embedding: bool = False
    shares_head: bool = False
    draft_vocab_size: int | None = None
    base_architectures: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], input_key: str) -> SpeculatorConfig:
        """Read a `config.json`; the size of the model's hidden states is under `input_key`.

        Raises:
            UnsupportedModelError: a key is missing, or has a value that is not implemented.
        """
        try:
            input_size = dimension(config, input_key)
            return cls(
                architecture=architecture_of(config),
                input_size=input_size,
                inner_size=dimension(config, "inner_dim") or input_size,
                vocab_size=int(config["vocab_size"]),
                n_predict=int(config["n_predict"]),
                tie_weights=bool(config.get("tie_weights", False)),
                tie_gates=bool(config.get("tie_lstm_embs", False)),
                scale_input=bool(config.get("scale_input", False)),
                shares_embedding=bool(config.get("share_base_embedding", False)),
                shares_head=bool(config.get("share_base_head", False)),
                draft_vocab_size=config.get("draft_vocab_size"),
                base_architectures=tuple(config.get("base_model_archs") or ()),
            )
        except KeyError as error:
            raise UnsupportedModelError(f"the speculator's config has no key {error}") from error

    def __post_init__(self) -> None:
        for name in ("input_size", "inner_size", "vocab_size", "n_predict"):
            if getattr(self, name) < 1:
                raise UnsupportedModelError(f"a speculator's {name} is {getattr(self, name)}")
        if self.draft_vocab_size is None:
            return
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise UnsupportedModelError(
                f"a speculator's draft_vocab_size is {self.draft_vocab_size}, "
                f"its vocab_size {self.vocab_size}"
            )
        if self.shares_head:
            raise UnsupportedModelError(
                f"a speculator with draft_vocab_size={self.draft_vocab_size} cannot share a head"
            )

    @property
    def state_weight(self) -> float:
        """How much of the first state is meant to be left after all heads, in standard terms."""
        return 0.5 ** (0.5 / self.n_predict)

    @property
    def token_scale(self) -> float:
        """What embedded tokens are multiplied by before they are added to the projected state."""
        emb_weight = math.sqrt((1 - self.state_weight**2) * self.inner_size / 2)
        return emb_weight / self.state_weight

    def check_base(self, base: ModelConfig, speculator_name: str, base_name: str) -> None:
        """See that it was made for this model.

        Raises:
            UnsupportedModelError: sizes or architectures differ; the message names both.
        """
        wrong = []
        if self.input_size != base.hidden_size:
            wrong.append(f"hidden states of {self.input_size}, not {base.hidden_size}")
        if self.vocab_size != base.vocab_size:
            wrong.append(f"a vocabulary of {self.vocab_size}, not {base.vocab_size}")
        # Hidden states of a SwiftKV student are those of its base model, as well as it has learned.
        architecture = base.architecture.replace("SwiftKV", "")
        if self.base_architectures and architecture not in self.base_architectures:
            wrong.append(f"architecture {', '.join(self.base_architectures)}, not {architecture}")
        if wrong:
            raise UnsupportedModelError(
                f"the speculator {speculator_name!r} was not made for the model {base_name!r}: "
                f"it wants {'; '.join(wrong)}"
            )

    def check_draft_token_ids(self, token_ids: np.ndarray[Any, Any]) -> None:
        """See that each row of the heads stands for a token.

        Raises:
            UnsupportedModelError: there are more or fewer ids, or others; the message has both.
        """
        shape, wanted = token_ids.shape, (self.draft_vocab_size,)
        if shape != wanted or token_ids.dtype.kind != "i":
            raise UnsupportedModelError(
                f"{DRAFT_TOKEN_IDS} is {token_ids.dtype} {shape}, not integers {wanted}"
            )
        if token_ids.min() < 0 or token_ids.max() >= self.vocab_size:
            raise UnsupportedModelError(
                f"{DRAFT_TOKEN_IDS} has tokens from {token_ids.min()} to {token_ids.max()}, "
                f"of a vocabulary of {self.vocab_size}"
            )


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the one architecture that a speculator's config names.

    Raises:
        UnsupportedModelError: there is not exactly one.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UnsupportedModelError(f"a speculator has one architecture, the config has {names!r}")
    return str(names[0])


def dimension(config: Mapping[str, Any], key: str) -> int:
    """Return a size that may be written as a number, a list or a string such as "4096".

    Raises:
        KeyError: it is missing.
        UnsupportedModelError: it is a list of several, of a stack of layers.
    """
    value = config[key]
    sizes = value if isinstance(value, list) else str(value).split(".")
    if len(sizes) != 1:
        raise UnsupportedModelError(f"a speculator with {key}={value!r}, a stack, is not supported")
    return int(sizes[0])


class Vocabulary(NamedTuple):
    """A model's matrices over the vocabulary."""

    embed: Embed
    head: Embed


class SpeculatorNorm(nnx.Module):
    """Root-mean-square normalisation with weight and bias, in float32."""

    def __init__(self, size: int) -> None:
        self.weight = parameter(size)
        self.bias = parameter(size)

    def __call__(self, x: Array, exact: Array | None = None) -> Array:
        """Normalise `x [..., size]` by its own root mean square, or by that of `exact`."""
        weight, bias = (p[...].astype(jnp.float32) for p in (self.weight, self.bias))
        return unit_norm(x, exact) * weight + bias


def unit_norm(x: Array, exact: Array | None = None) -> Array:
    """Return `x [..., size]` in float32, by its own root mean square, or by that of `exact`."""
    squares = jnp.square((x if exact is None else exact).astype(jnp.float32))
    return x.astype(jnp.float32) * jax.lax.rsqrt(squares.mean(-1, keepdims=True) + EPSILON)


def product(x: Array, weight: Array) -> Array:
    """`x [..., in]` times `weight [out, in]`, float32."""
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)


class TokenEmbedding(nnx.Module):
    """A head's embedding of a token: tables of its own, or a projection of the model's.

    `copies` embeddings lie side by side, one for each gate that has its own.
    """

    def __init__(self, config: SpeculatorConfig, copies: int, num_devices: int) -> None:
        vocab, inner = config.vocab_size, config.inner_size
        shares = config.shares_embedding
        self.projection = parameter(copies * inner, config.input_size) if shares else None
        self.tables = nnx.List(
            [] if shares else [Embed(vocab, inner, num_devices) for _ in range(copies)]
        )

    def __call__(self, token_ids: Array, base: Vocabulary, layout: MeshLayout) -> Array:
        """`[S]` token ids to float32 `[S, copies * inner]`."""
        if self.projection is not None:
            return product(base.embed(token_ids, layout), self.projection[...])
        tables = [table(token_ids, layout) for table in self.tables]
        return jnp.concatenate(tables, axis=-1).astype(jnp.float32)

    def sources(self, names: Sequence[str], projection: str) -> dict[str, Source]:
        """Say what each parameter is read from: tables called `names`, or the projection."""
        found = {f"tables.{i}.weight": Rows(name) for i, name in enumerate(names)}
        return {"projection": Rows(projection), **found}


class OutputHead(nnx.Module):
    """From a head's state to the vocabulary, by a matrix of its own or by the model's.

    One of its own may have rows for the frequent tokens only: reading it is most of a draft's time,
    and what it cannot draft costs acceptance alone (FR-Spec: Zhao et al. 2025, arXiv 2502.14856).
    """

    def __init__(self, config: SpeculatorConfig, num_devices: int) -> None:
        inner, shares = config.inner_size, config.shares_head
        self.projection = parameter(config.input_size, inner) if shares else None
        kept = config.draft_vocab_size
        self.table = None if shares else Embed(kept or config.vocab_size, inner, num_devices)
        self.token_ids = parameter(kept, dtype=jnp.int32) if kept else None

    def likeliest(self, x: Array, base: Vocabulary, layout: MeshLayout) -> Array:
        """`[S, inner]` to the likeliest token of each row, `[S]`."""
        x, table = self._projected(x, base)
        rows = table.likeliest(x, layout)
        return rows if self.token_ids is None else self.token_ids[...][rows]

    def logits(self, x: Array, base: Vocabulary, layout: MeshLayout) -> Array:
        """`[S, inner]` to float32 logits `[S, vocab]`, or of the tokens that it knows."""
        x, table = self._projected(x, base)
        return table.logits(x, layout)

    def _projected(self, x: Array, base: Vocabulary) -> tuple[Array, Embed]:
        if self.projection is not None:
            return product(x, self.projection[...]).astype(x.dtype), base.head
        assert self.table is not None
        return x, self.table


class Speculator(nnx.Module):
    """The chain of heads; subclasses say what a head makes of the state before it and a token.

    Head k uses the k-th member of a list of modules, or the last if the list is shorter: so are
    weights tied.

    Args:
        config: its numbers.
        num_devices: over which the vocabulary is split.
        copies: embeddings of a token that a head wants.
    """

    input_key: ClassVar[str]
    """The config's key for the size of the model's hidden states."""
    embedding_names: ClassVar[tuple[str, ...]]
    """Names of a head's embedding tables in checkpoints, without number."""

    def __init__(self, config: SpeculatorConfig, num_devices: int, copies: int = 1) -> None:
        self.config = config
        num = self.num_tied
        self.embeds = nnx.List([TokenEmbedding(config, copies, num_devices) for _ in range(num)])
        self.heads = nnx.List([OutputHead(config, num_devices) for _ in range(num)])

    @property
    def num_tied(self) -> int:
        """Members of a list of modules that all heads share if weights are tied."""
        return 1 if self.config.tie_weights else self.config.n_predict

    @property
    def projected_sizes(self) -> list[int]:
        """Sizes of the states that are projected: of the model, and of as many heads as differ."""
        inner, num = self.config.inner_size, self.config.n_predict
        return [self.config.input_size] + [inner] * min(num - 1, max(self.num_tied - 1, 1))

    def start(self, hidden: Array) -> State:
        """Make the first state of the model's `hidden [S, input]`."""
        if self.config.scale_input:
            hidden = (unit_norm(hidden) / math.sqrt(2)).astype(hidden.dtype)
        return (hidden,)

    def advance(self, k: int, state: State, embedded: Array) -> tuple[Array, State]:
        """Run head k on the state before it and `embedded [S, copies * inner]` (float32).

        Returns:
            What its output head takes, `[S, inner]`, and the state after it.
        """
        raise NotImplementedError

    def __call__(
        self,
        hidden: Array,
        token_ids: Array,
        base: Vocabulary,
        layout: MeshLayout,
        num_tokens: int | None = None,
    ) -> Array:
        """Draft greedily.

        Args:
            hidden: `[S, input]` the model's states, as its head takes them.
            token_ids: `[S]` the tokens that were drawn from them.
            base: the model's own matrices.
            layout: rows are on every device, whatever it does with tokens elsewhere.
            num_tokens: of a draft; all heads' by default.

        Returns:
            `[S, num_tokens]`.
        """
        layout, state, draft = layout.narrow, self.start(hidden), []
        for k in range(num_tokens or self.config.n_predict):
            token_ids = jnp.clip(token_ids, 0, self.config.vocab_size - 1)
            embedded = at(self.embeds, k)(token_ids, base, layout)
            x, state = self.advance(k, state, embedded)
            token_ids = at(self.heads, k).likeliest(x, base, layout)
            draft.append(token_ids)
        return jnp.stack(draft, axis=1)

    def weight_sources(self) -> dict[str, Source]:
        """Say, for each parameter's path, which checkpoint tensors it is read from."""
        sources: dict[str, Source] = {}
        for i in range(self.num_tied):
            names = [f"{name}.{i}.weight" for name in self.embedding_names]
            embedding = self.embeds[i].sources(names, f"emb_proj.{i}.weight")
            sources |= {f"embeds.{i}.{path}": source for path, source in embedding.items()}
            sources[f"heads.{i}.table.weight"] = Rows(f"head.{i}.weight")
            sources[f"heads.{i}.projection"] = Rows(f"head_proj.{i}.weight")
            sources[f"heads.{i}.token_ids"] = Rows(DRAFT_TOKEN_IDS)
        return sources


def at[T](members: Sequence[T], k: int) -> T:
    """Return the k-th member, or the last one that there is."""
    return members[min(k, len(members) - 1)]


def norm_sources(path: str, name: str, count: int) -> dict[str, Source]:
    """Say what the norms in the list at `path` are read from."""
    kinds = ("weight", "bias")
    return {
        f"{path}.{i}.{kind}": Rows(f"{name}.{i}.{kind}") for i in range(count) for kind in kinds
    }
