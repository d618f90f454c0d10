"""Distillation of a SwiftKV student from its own base model (arXiv 2410.03960, section 3.3).

Owned by one process. Teacher and student share every weight but the student's own projections and
norm; these alone are trained, in float32, data-parallel over the devices.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arctic_jax.config import LoadConfig, ModelConfig
from arctic_jax.interrupts import interrupts_held
from arctic_jax.loading.model_files import ModelFiles, open_model
from arctic_jax.models.registry import model_class
from arctic_jax.progress import Report, silent
from arctic_jax.training import data, swiftkv_checkpoint
from arctic_jax.training.forward import (
    Batch,
    Implementation,
    Weights,
    output_head,
    teacher_and_student,
)
from arctic_jax.training.losses import divergence, hidden_error

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
PLOT = "loss.png"
SETTINGS = "settings.json"
OWN = "swiftkv.safetensors"
MODEL = "model"


@dataclass(frozen=True)
class Recipe:
    """How a student is made; by default as ArcticTraining's SwiftKV recipe has it.

    Attributes:
        num_key_value_layers: l, layers that run on every token.
        key_value_group_size: g, upper layers that share keys and values.
        steps: of the optimiser; `None` for `epochs`.
        epochs: over the data.
        batch_size: rows of a step, over all devices.
        max_length: tokens of a row.
        learning_rate: the highest.
        schedule: what follows the warm-up.
        warmup: share of the steps.
        max_gradient_norm: larger gradients are scaled down to it.
        temperature: T of the T² · KL term.
        hidden_weight: of the mean squared error of the hidden states.
        dtype: in which both models are computed.
        attention: "xla" or "cudnn"; `None` for the faster one that can run.
        seed: of the order of the data.
        save_every: steps between checkpoints.
    """

    num_key_value_layers: int
    key_value_group_size: int = 1
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    max_length: int = 2048
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    max_gradient_norm: float = 1.0
    temperature: float = 2.0
    hidden_weight: float = 1.0
    dtype: str = "bfloat16"
    attention: Implementation | None = None
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "save_every", "epochs", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be cosine or constant, got {self.schedule!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")

    def num_steps(self, num_rows: int) -> int:
        """Steps over data of so many rows."""
        return self.steps or max(round(self.epochs * num_rows / self.batch_size), 1)

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Return the learning rate of each step: a linear warm-up, and what follows it."""
        warmup, highest = round(self.warmup * steps), self.learning_rate
        rest = max(steps - warmup, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(highest, rest),
            "constant": optax.constant_schedule(highest),
        }[self.schedule]
        before = optax.linear_schedule(highest / max(warmup, 1), highest, max(warmup - 1, 1))
        return optax.join_schedules([before, after], [warmup])

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam without weight decay, of clipped gradients."""
        return optax.chain(
            optax.clip_by_global_norm(self.max_gradient_norm),
            optax.adam(self.learning_rates(steps), b1=0.9, b2=0.999),
        )


Progress = Callable[[Mapping[str, float]], None]


def distill(
    load: LoadConfig,
    data_file: Path,
    directory: Path,
    recipe: Recipe,
    report: Report = silent,
    on_step: Progress = lambda _: None,
) -> None:
    """Train a student and write it; a run that was killed goes on where it last saved.

    Ctrl-C saves, and writes the student's own tensors as they are.

    In the directory: `log.jsonl`, a line a step; `loss.png`, if matplotlib is there; the student's
    own tensors in bfloat16, `swiftkv.safetensors`; and `model/`, the student as a model.

    Args:
        load: the teacher.
        data_file: JSON lines, see `data`.
        directory: made if need be.
        recipe: how.
        report: told how far loading and training are.
        on_step: told what was logged of each step.

    Raises:
        ValueError: the recipe, the data, or what is in the directory do not fit.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
    """
    files = open_model(load, report)
    student = swiftkv_checkpoint.student_config(
        files.config, recipe.num_key_value_layers, recipe.key_value_group_size
    )
    config = model_class(student).config_from_hf(student)
    if config.num_lower_layers == config.num_hidden_layers:
        raise ValueError(f"with {config.num_lower_layers} lower layers there is nothing to train")
    rows = data.read_rows(data_file, files.tokenizer, recipe.max_length)
    directory.mkdir(parents=True, exist_ok=True)
    _settle(directory / SETTINGS, {**asdict(recipe), "model": load.model, "rows": len(rows)})
    training = Training(files, config, rows, directory, recipe)
    interrupted = training.run(report, on_step)
    own = training.own()
    _plot(directory)
    swiftkv_checkpoint.save_own(own, directory / OWN)
    if interrupted:
        raise interrupted
    if not (directory / MODEL).exists():
        swiftkv_checkpoint.write_student(files, student, own, directory / MODEL, load.dtype, report)


@dataclass(frozen=True)
class _Launched:
    """A step that the device has begun or will: when it was given to it, and what it returns."""

    step: int
    start: float
    tokens: int
    metrics: dict[str, Array]


class Training:
    """The steps, from the last checkpoint on.

    Args:
        files: of the teacher.
        config: of the student.
        rows: the data.
        directory: for the log and the checkpoints.
        recipe: see there.

    Raises:
        ValueError: a batch cannot be split over the devices.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: ModelConfig,
        rows: data.Rows,
        directory: Path,
        recipe: Recipe,
    ) -> None:
        devices = np.asarray(jax.devices())
        if recipe.batch_size % len(devices):
            raise ValueError(
                f"batch_size {recipe.batch_size} cannot be split over {len(devices)} devices"
            )
        self.config, self.rows, self.recipe, self.directory = config, rows, recipe, directory
        self.steps = recipe.num_steps(len(rows))
        mesh = Mesh(devices, ("data",))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._learning_rates = np.asarray(recipe.learning_rates(self.steps)(np.arange(self.steps)))
        self._optimizer = recipe.optimizer(self.steps)
        checkpoint = swiftkv_checkpoint.original_weights(files)
        own = swiftkv_checkpoint.initial_values(checkpoint, config)
        own = jax.device_put(own, self._replicated)
        self.weights = load_weights(checkpoint, recipe.dtype, self._replicated)
        self.state: dict[str, Any] = {
            "own": own,
            "optimizer": jax.jit(self._optimizer.init, out_shardings=self._replicated)(own),
        }
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._end = 0.0  # of the step that was waited for last

    def own(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the student's own tensors as they are now, float32."""
        return {name: np.asarray(value) for name, value in self.state["own"].items()}

    def run(self, report: Report, on_step: Progress) -> KeyboardInterrupt | None:
        """Train to the end, or until Ctrl-C, which is returned when the state has been saved."""
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        folder = (self.directory / "checkpoints").absolute()
        with ocp.CheckpointManager(folder, options=options) as manager:
            first = self._resume(manager)
            order = data.batches(len(self.rows), self.recipe.batch_size, self.recipe.seed)
            with (self.directory / LOG).open("a", encoding="utf-8") as log:
                done, running, interrupted = first, None, None

                def finish() -> None:
                    nonlocal running
                    if running is not None:
                        step, running = running, None
                        line = self._finished(step)
                        log.write(json.dumps(line) + "\n")
                        log.flush()
                        on_step(line)
                        report("Distilling", step.step + 1, self.steps)

                try:
                    for rows in itertools.islice(order, first, self.steps):
                        with interrupts_held():  # the device has a step to do while one is logged
                            step = self._launch(done, rows)
                            finish()
                            running, done = step, done + 1
                        if done % self.recipe.save_every == 0:
                            with interrupts_held():
                                finish()
                            self._save(manager, done)
                except KeyboardInterrupt as interrupt:
                    interrupted = interrupt
                finish()
                self._save(manager, done)
        return interrupted

    def _save(self, manager: ocp.CheckpointManager, done: int) -> None:
        if done and manager.latest_step() != done:
            manager.save(done, args=ocp.args.StandardSave(self.state))

    def _resume(self, manager: ocp.CheckpointManager) -> int:
        """Restore the last checkpoint; return the first step to do, and forget later log lines."""
        log = self.directory / LOG
        first = manager.latest_step() or 0
        if first:
            abstract = jax.tree.map(_abstract, self.state)
            restored = manager.restore(first, args=ocp.args.StandardRestore(abstract))
            self.state = dict(restored)
            logger.info("going on at step %d of %d", first, self.steps)
        lines = log.read_text("utf-8").splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(lines[:first]), "utf-8")
        return first

    def _launch(self, step: int, rows: np.ndarray[Any, Any]) -> _Launched:
        fields = self.rows.fields(rows)
        start = time.perf_counter()
        batch = Batch(**jax.device_put(fields, self._split))
        self.state, metrics = self._step(self.state, self.weights, batch)
        return _Launched(step, start, int((fields["segment_ids"] > 0).sum()), metrics)

    def _finished(self, launched: _Launched) -> dict[str, float]:
        """Wait for a step; return its line of the log.

        Raises:
            ValueError: the loss is no number.
        """
        values = {name: float(value) for name, value in jax.device_get(launched.metrics).items()}
        end = time.perf_counter()
        seconds, self._end = end - max(launched.start, self._end), end
        if not np.isfinite(values["loss"]):
            raise ValueError(f"the loss of step {launched.step} is {values['loss']}")
        return {
            "step": launched.step,
            **values,
            "learning_rate": float(self._learning_rates[launched.step]),
            "tokens": launched.tokens,
            "seconds": seconds,
            "tokens_per_s": launched.tokens / seconds,
        }

    def _train_step(
        self, state: dict[str, Any], weights: Weights, batch: Batch
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        loss = functools.partial(distillation_loss, config=self.config, recipe=self.recipe)
        (total, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
            state["own"], weights, batch
        )
        updates, optimizer = self._optimizer.update(gradients, state["optimizer"], state["own"])
        own = optax.apply_updates(state["own"], updates)
        metrics |= {
            "loss": total,
            "gradient_norm": optax.tree.norm(gradients),
        }
        return {"own": own, "optimizer": optimizer}, metrics


def distillation_loss(
    own: Weights, weights: Weights, batch: Batch, *, config: ModelConfig, recipe: Recipe
) -> tuple[Array, dict[str, Array]]:
    """`T² · KL(teacher ‖ student)` of the tokens that count, plus the error of the hidden states.

    Args:
        own: the student's own tensors, the only ones with a gradient.
        weights: of the teacher.
        batch: of rows.
        config: of the student.
        recipe: temperature and weight.

    Returns:
        The loss, and its parts.
    """
    teacher, student = teacher_and_student(weights, own, config, batch, recipe.attention)
    fixed = (output_head(weights, config), batch.counts)
    total, agreement = divergence(student.last, teacher.last, fixed, recipe.temperature)
    tokens = jnp.maximum(batch.counts.sum(), 1)
    kl = recipe.temperature**2 * total / tokens
    mse = hidden_error(batch, teacher, student)
    parts = {"kl": kl, "mse": mse, "agreement": agreement / tokens}
    return kl + recipe.hidden_weight * mse, parts


def load_weights(checkpoint: Any, dtype: str, sharding: NamedSharding) -> dict[str, Array]:
    """Place all floating-point tensors of a checkpoint on the devices, by their names."""
    placed = {}
    for name in checkpoint:
        tensor = checkpoint.read(name)
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            placed[name] = jax.device_put(tensor.astype(jnp.dtype(dtype)), sharding)
    return placed


def _abstract(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _settle(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what a run is made of, or see that it goes on with the same.

    Raises:
        ValueError: it began with other settings; the message has those that differ.
    """
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        differing = {n: (found.get(n), v) for n, v in settings.items() if found.get(n) != v}
        if differing:
            raise ValueError(f"{path.parent} was begun with other settings: {differing}")
    path.write_text(json.dumps(dict(settings), indent=1) + "\n", "utf-8")


def _plot(directory: Path) -> None:
    """Draw the loss over the tokens."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        logger.info("without matplotlib there is no %s", PLOT)
        return
    lines = [json.loads(line) for line in (directory / LOG).read_text("utf-8").splitlines()]
    tokens = np.cumsum([line["tokens"] for line in lines]) / 1e6
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name in ("loss", "kl", "mse"):
        values = [max(line[name], 1e-8) for line in lines]  # rounding may leave less than nothing
        axes.plot(tokens, values, label=name)
    axes.set(xlabel="million tokens", yscale="log")
    axes.legend()
    figure.savefig(directory / PLOT, dpi=120)
