"""Training of a speculator for a model that stays as it is (the recipe of ArcticTraining).

Owned by one process. The model reads whole sequences; from each of its states, head k of the
speculator is to say the token k + 2 places further on, knowing those in between: all heads and all
places at once. Its parameters alone are trained, in float32, data-parallel over the devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

from arctic_jax.config import LoadConfig, ModelConfig
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.loading.model_files import ModelFiles, open_model
from arctic_jax.models.layers import Embed, named_parameters
from arctic_jax.models.registry import model_class, speculator_class
from arctic_jax.models.speculator import Speculator, Vocabulary, at
from arctic_jax.progress import Report, silent
from arctic_jax.shift_parallel import shift
from arctic_jax.training import data, speculator_checkpoint
from arctic_jax.training.forward import Batch, Weights, hidden_states
from arctic_jax.training.loop import (
    Progress,
    TrainingLoop,
    TrainingRecipe,
    load_weights,
    plot,
    prepare,
)
from arctic_jax.training.losses import divisor
from arctic_jax.training.swiftkv_checkpoint import STUDENTS, original_weights

SPECULATOR = "speculator"
LOGIT_TOKENS = 256
"""Tokens of a row whose logits are there at once: for all of them memory would not do."""


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """How a speculator is made.

    Attributes:
        kind: "lstm" or "mlp".
        inner_size: of its states.
        n_predict: heads.
        shares: whether it uses the model's own embedding and head, by projections.
        weight_decay: of AdamW, for matrices.
    """

    kind: str = "lstm"
    inner_size: int = 1024
    n_predict: int = 3
    shares: bool = True
    weight_decay: float = 0.1

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW, of clipped gradients; norms do not decay."""
        return optax.chain(
            optax.clip_by_global_norm(self.max_gradient_norm),
            optax.adamw(
                self.learning_rates(steps),
                b1=0.9,
                b2=0.95,
                weight_decay=self.weight_decay,
                mask=lambda own: jax.tree.map(lambda value: value.ndim > 1, own),
            ),
        )


def train(
    load: LoadConfig,
    data_file: Path,
    directory: Path,
    recipe: Recipe,
    report: Report = silent,
    on_step: Progress = lambda _: None,
) -> int:
    """Train a speculator and write it; a run that was killed goes on where it last saved.

    Ctrl-C saves, and writes the speculator as it is.

    In the directory: `log.jsonl`, a line a step; `loss.png`, if matplotlib is there; and
    `speculator/`, in bfloat16, for `speculative_config`'s `model`.

    Args:
        load: the model.
        data_file: JSON lines, see `data`.
        directory: made if need be.
        recipe: how.
        report: told how far loading and training are.
        on_step: told what was logged of each step.

    Returns:
        Parameters of the speculator.

    Raises:
        ValueError: the recipe, the data, or what is in the directory do not fit.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
    """
    files = open_model(load, report)
    names = files.config.get("architectures") or []
    if not set(STUDENTS).issuperset(names):
        raise UnsupportedModelError(
            f"speculators of {names} cannot be trained, only of {sorted(STUDENTS)}"
        )
    base = model_class(files.config).config_from_hf(files.config)
    config = speculator_checkpoint.speculator_config(
        base, recipe.kind, recipe.inner_size, recipe.n_predict, recipe.shares
    )
    rows = prepare(directory, recipe, load, data_file, files.tokenizer)
    training = Training(files, base, config, rows, directory, recipe)
    interrupted = training.run(report, on_step)
    tensors = speculator_checkpoint.checkpoint_tensors(training.speculator, training.own())
    plot(directory, [f"loss_{k}" for k in range(1, recipe.n_predict + 1)], scale="linear")
    count = speculator_checkpoint.save(config, tensors, directory / SPECULATOR)
    if interrupted:
        raise interrupted
    return count


class Training(TrainingLoop):
    """The steps of a speculator's training.

    Args:
        files: of the model.
        base: its numbers.
        config: of the speculator, in the form of its `config.json`.
        rows, directory, recipe: see `TrainingLoop`.
    """

    def __init__(
        self,
        files: ModelFiles,
        base: ModelConfig,
        config: Mapping[str, Any],
        rows: data.Rows,
        directory: Path,
        recipe: Recipe,
    ) -> None:
        super().__init__(rows, directory, recipe, "Training")
        self.base, self.recipe = base, recipe
        cls = speculator_class(config)
        numbers = cls.config_from_hf(config)
        self.speculator: Speculator = nnx.eval_shape(lambda: cls(numbers, 1))
        self.weights = load_weights(original_weights(files), recipe.dtype, self.replicated)
        self.begin(speculator_checkpoint.initial_values(self.speculator, recipe.seed))

    def loss(self, own: Weights, weights: Weights, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """See `TrainingLoop`."""
        dtype = jnp.dtype(self.recipe.dtype)
        paths = named_parameters(self.speculator)
        tree = jax.tree.structure(self.speculator)
        speculator = jax.tree.unflatten(tree, [own[path].astype(dtype) for path in paths])
        weights = lax.stop_gradient(dict(weights))
        hidden = hidden_states(weights, self.base, batch, self.recipe.attention).last
        found = heads_losses(
            speculator, vocabulary(weights, self.base), lax.stop_gradient(hidden), batch
        )
        numbered = range(1, self.recipe.n_predict + 1)
        metrics = {f"loss_{k}": found[0][k - 1] for k in numbered}
        metrics |= {f"accepted_{k}": found[1][k - 1] for k in numbered}
        return found[0].sum(), metrics


def vocabulary(weights: Weights, base: ModelConfig) -> Vocabulary:
    """Return a model's own matrices as the modules that a speculator takes."""
    embed = nnx.eval_shape(lambda: Embed(base.vocab_size, base.hidden_size, 1))
    tree = jax.tree.structure(embed)
    head = "model.embed_tokens" if base.tie_word_embeddings else "lm_head"
    names = ("model.embed_tokens.weight", f"{head}.weight")
    return Vocabulary(*(jax.tree.unflatten(tree, [weights[name]]) for name in names))


def heads_losses(
    speculator: Speculator, base: Vocabulary, hidden: Array, batch: Batch
) -> tuple[Array, Array]:
    """Cross-entropy and acceptance of each head.

    Head k starts from the state at t, is told the tokens t + 1 … t + k + 1, and is to say token
    t + k + 2. It counts where all these are an answer's.

    Args:
        speculator: in the type of the computation.
        base: the model's own matrices.
        hidden: `[B, S, hidden]` the model's last states.
        batch: what it read.

    Returns:
        `[n]` mean cross-entropy in nats, and `[n]` how often a greedy draft from this state would
        have been accepted up to and with this head.
    """
    heads = speculator.config.n_predict
    given, counted = _shifted(batch, heads)
    size = divisor(hidden.shape[1], LOGIT_TOKENS)

    @jax.checkpoint
    def part(hidden: Array, given: Array, counted: Array) -> Sequence[Array]:
        """Sums over a part: `[B, size, hidden]`, `[n + 1, B, size]`, `[n, B, size]`."""
        state = speculator.start(hidden.reshape(-1, hidden.shape[-1]))
        given, counted = given.reshape(heads + 1, -1), counted.reshape(heads, -1)
        losses, accepted, all_right = [], [], jnp.ones(given.shape[1:], bool)
        for k in range(heads):
            embedded = at(speculator.embeds, k)(given[k], base, shift(1, 1))
            x, state = speculator.advance(k, state, embedded)
            logits = at(speculator.heads, k).logits(x, base, shift(1, 1))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, given[k + 1])
            all_right &= logits.argmax(-1) == given[k + 1]
            losses.append(jnp.where(counted[k], loss, 0).sum())
            accepted.append((counted[k] & all_right).sum(dtype=jnp.float32))
        return jnp.stack(losses), jnp.stack(accepted), counted.sum(1, dtype=jnp.float32)

    def step(total: Sequence[Array], arguments: tuple[Array, ...]) -> tuple[Sequence[Array], None]:
        return jax.tree.map(jnp.add, tuple(total), part(*arguments)), None

    def split(x: Array) -> Array:
        """`[n, B, S, …]` to parts of the sequences, `[parts, n, B, size, …]`.

        Along the sequence, so that each device keeps its rows.
        """
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    parts = split(hidden[None])[:, 0], split(given), split(counted)
    zeros = (jnp.zeros(heads),) * 3
    (losses, accepted, counts), _ = lax.scan(step, zeros, parts)
    counts = jnp.maximum(counts, 1)
    return losses / counts, accepted / counts


def _shifted(batch: Batch, heads: int) -> tuple[Array, Array]:
    """Return the tokens `[n + 1, B, S]` after each one, and whether a head counts, `[n, B, S]`."""
    length = batch.token_ids.shape[1]
    shifts = range(1, heads + 2)
    given = jnp.stack([jnp.roll(batch.token_ids, -by, axis=1) for by in shifts])
    counts = batch.counts.astype(bool)
    counted = []
    for by in shifts:  # a token of an answer that is followed by so many more of the same sequence
        inside = jnp.arange(length) + by < length
        shifted = jnp.roll(batch.counts.astype(bool), -(by - 1), axis=1)
        counts = counts & shifted & inside
        counted.append(counts)
    return given, jnp.stack(counted[1:])
