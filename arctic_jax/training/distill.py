"""Distillation of a SwiftKV student from its own base model (arXiv 2410.03960, section 3.3).

Owned by one process. Teacher and student share every weight but the student's own projections and
norm; these alone are trained, in float32, data-parallel over the devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax import Array

from arctic_jax.config import LoadConfig, ModelConfig
from arctic_jax.loading.model_files import ModelFiles, open_model
from arctic_jax.models.registry import model_class
from arctic_jax.progress import Report, silent
from arctic_jax.training import data, swiftkv_checkpoint
from arctic_jax.training.forward import Batch, Weights, output_head, teacher_and_student
from arctic_jax.training.loop import LOG as LOG
from arctic_jax.training.loop import (
    Progress,
    TrainingLoop,
    TrainingRecipe,
    load_weights,
    plot,
    prepare,
)
from arctic_jax.training.losses import divergence, hidden_error

OWN = "swiftkv.safetensors"
MODEL = "model"


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """How a student is made; by default as ArcticTraining's SwiftKV recipe has it.

    Attributes:
        num_key_value_layers: l, layers that run on every token.
        key_value_group_size: g, upper layers that share keys and values.
        temperature: T of the T² · KL term.
        hidden_weight: of the mean squared error of the hidden states.
    """

    num_key_value_layers: int
    key_value_group_size: int = 1
    temperature: float = 2.0
    hidden_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


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
    rows = prepare(directory, recipe, load, data_file, files.tokenizer)
    training = Training(files, config, rows, directory, recipe)
    interrupted = training.run(report, on_step)
    own = training.own()
    plot(directory, ("loss", "kl", "mse"))
    swiftkv_checkpoint.save_own(own, directory / OWN)
    if interrupted:
        raise interrupted
    if not (directory / MODEL).exists():
        swiftkv_checkpoint.write_student(files, student, own, directory / MODEL, load.dtype, report)


class Training(TrainingLoop):
    """The steps of a distillation.

    Args:
        files: of the teacher.
        config: of the student.
        rows, directory, recipe: see `TrainingLoop`.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: ModelConfig,
        rows: data.Rows,
        directory: Path,
        recipe: Recipe,
    ) -> None:
        super().__init__(rows, directory, recipe, "Distilling")
        self.config, self.recipe = config, recipe
        checkpoint = swiftkv_checkpoint.original_weights(files)
        self.weights = load_weights(checkpoint, recipe.dtype, self.replicated)
        self.begin(swiftkv_checkpoint.initial_values(checkpoint, config))

    def loss(self, own: Weights, weights: Weights, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """See `TrainingLoop`."""
        return distillation_loss(own, weights, batch, config=self.config, recipe=self.recipe)


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
