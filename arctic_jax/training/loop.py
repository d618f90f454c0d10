"""What every training run has: a recipe's schedule, and the loop with its log and checkpoints.

Owned by one process. What is trained is in float32, data-parallel over all devices; what is not is
an argument of each step.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
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

from arctic_jax.config import LoadConfig
from arctic_jax.interrupts import interrupts_held
from arctic_jax.loading.tokenizer import Tokenizer
from arctic_jax.progress import Report
from arctic_jax.training import data
from arctic_jax.training.forward import Batch, Implementation, Weights

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
PLOT = "loss.png"
SETTINGS = "settings.json"

Progress = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How long, how fast, and on how much at once.

    Attributes:
        steps: of the optimiser; `None` for `epochs`.
        epochs: over the data.
        batch_size: rows of a step, over all devices.
        max_length: tokens of a row.
        learning_rate: the highest.
        schedule: what follows the warm-up.
        warmup: share of the steps.
        max_gradient_norm: larger gradients are scaled down to it.
        dtype: in which models are computed.
        attention: "xla" or "cudnn"; `None` for the faster one that can run.
        seed: of the order of the data.
        save_every: steps between checkpoints.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    max_length: int = 2048
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    max_gradient_norm: float = 1.0
    dtype: str = "bfloat16"
    attention: Implementation | None = None
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "save_every", "epochs"):
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


@dataclass(frozen=True)
class _Launched:
    """A step that the device has begun, or will: when, on how many tokens, what it returns."""

    step: int
    start: float
    tokens: int
    metrics: dict[str, Array]


class TrainingLoop:
    """The steps, from the last checkpoint on; subclasses say what is trained, and on which loss.

    They set `weights`, which stay, and call `begin` with what is trained.

    Args:
        rows: the data.
        directory: for the log and the checkpoints.
        recipe: see there.
        title: of the progress.

    Raises:
        ValueError: a batch cannot be split over the devices.
    """

    weights: Weights

    def __init__(
        self, rows: data.Rows, directory: Path, recipe: TrainingRecipe, title: str
    ) -> None:
        devices = np.asarray(jax.devices())
        if recipe.batch_size % len(devices):
            raise ValueError(
                f"batch_size {recipe.batch_size} cannot be split over {len(devices)} devices"
            )
        self.rows, self.directory, self.title = rows, directory, title
        self.schedule = recipe
        self.steps = recipe.num_steps(len(rows))
        mesh = Mesh(devices, ("data",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._learning_rates = np.asarray(recipe.learning_rates(self.steps)(np.arange(self.steps)))
        self._optimizer = recipe.optimizer(self.steps)
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._end = 0.0  # of the step that was waited for last

    def begin(self, own: Mapping[str, Any]) -> None:
        """Take over what is trained, by any names, as it is before the first step."""
        placed = jax.device_put(dict(own), self.replicated)
        begun = jax.jit(self._optimizer.init, out_shardings=self.replicated)(placed)
        self.state: dict[str, Any] = {"own": placed, "optimizer": begun}

    def loss(self, own: Weights, weights: Weights, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """Return the loss of a batch, and what else is logged of it. Pure."""
        raise NotImplementedError

    def own(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return what is trained as it is now, float32."""
        return {name: np.asarray(value) for name, value in self.state["own"].items()}

    def run(self, report: Report, on_step: Progress) -> KeyboardInterrupt | None:
        """Train to the end, or until Ctrl-C, which is returned when the state has been saved."""
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        folder = (self.directory / "checkpoints").absolute()
        with ocp.CheckpointManager(folder, options=options) as manager:
            first = self._resume(manager)
            batch_size, seed = self.schedule.batch_size, self.schedule.seed
            order = data.batches(len(self.rows), batch_size, seed)
            with (self.directory / LOG).open("a", encoding="utf-8") as log:
                done, interrupted = first, None
                unlogged: _Launched | None = None

                def log_step(launched: _Launched | None) -> None:
                    """Wait for a step, and log it."""
                    if launched is None:
                        return
                    line = self._wait(launched)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    on_step(line)
                    report(self.title, int(line["step"]) + 1, self.steps)

                try:
                    for rows in itertools.islice(order, first, self.steps):
                        with interrupts_held():
                            # While one step is logged, the device has the next to do.
                            before, unlogged = unlogged, self._launch(done, rows)
                            done += 1
                            log_step(before)
                            if done % self.schedule.save_every == 0:
                                before, unlogged = unlogged, None
                                log_step(before)
                                self._save(manager, done)
                except KeyboardInterrupt as interrupt:
                    interrupted = interrupt
                with interrupts_held():
                    log_step(unlogged)
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

    def _wait(self, launched: _Launched) -> dict[str, float]:
        """Wait for a step; return its line of the log.

        Raises:
            ValueError: the loss is no finite number.
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
        (total, metrics), gradients = jax.value_and_grad(self.loss, has_aux=True)(
            state["own"], weights, batch
        )
        updates, optimizer = self._optimizer.update(gradients, state["optimizer"], state["own"])
        own = optax.apply_updates(state["own"], updates)
        metrics |= {
            "loss": total,
            "gradient_norm": optax.tree.norm(gradients),
        }
        return {"own": own, "optimizer": optimizer}, metrics


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


def prepare(
    directory: Path,
    recipe: TrainingRecipe,
    load: LoadConfig,
    data_file: Path,
    tokenizer: Tokenizer,
) -> data.Rows:
    """Read the rows of a run; write what it is made of, or see that it goes on with the same.

    Args:
        directory: of the run; made if need be.
        recipe: how it trains.
        load: the model.
        data_file: JSON lines, see `data`.
        tokenizer: of the model.

    Raises:
        ValueError: the data do not fit, or the run was begun with other settings; the message has
            those that differ.
    """
    rows = data.read_rows(data_file, tokenizer, recipe.max_length)
    settings = {**asdict(recipe), "model": load.model, "rows": len(rows)}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SETTINGS
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        differing = {n: (found.get(n), v) for n, v in settings.items() if found.get(n) != v}
        if differing:
            raise ValueError(f"{directory} was begun with other settings: {differing}")
    path.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    return rows


def plot(directory: Path, names: Sequence[str], scale: str = "log") -> None:
    """Draw what was logged under these names over the tokens."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        logger.info("without matplotlib there is no %s", PLOT)
        return
    lines = [json.loads(line) for line in (directory / LOG).read_text("utf-8").splitlines()]
    tokens = np.cumsum([line["tokens"] for line in lines]) / 1e6
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name in names:
        values = [max(line[name], 1e-8) for line in lines]  # rounding may leave less than nothing
        axes.plot(tokens, values, label=name)
    axes.set(xlabel="million tokens", yscale=scale)
    axes.legend()
    figure.savefig(directory / PLOT, dpi=120)
