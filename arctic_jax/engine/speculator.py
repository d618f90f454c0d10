"""Finding the speculator that an engine is to draft with. Engine start only."""

from __future__ import annotations

from dataclasses import dataclass

from arctic_jax.config import EngineConfig, ModelConfig
from arctic_jax.engine.step_program import Drafting
from arctic_jax.loading.model_files import open_weights
from arctic_jax.models.registry import speculator_class
from arctic_jax.progress import Report
from arctic_jax.weights import Checkpoint, Renamed

PREFIX = "speculator."
"""Of all names in some checkpoints."""


@dataclass(frozen=True)
class SpeculatorFiles:
    """A speculator that fits its model.

    Attributes:
        drafting: what it is made of, and how much it drafts.
        checkpoint: its weights; `None` for random ones.
    """

    drafting: Drafting
    checkpoint: Checkpoint | None


def open_speculator(
    config: EngineConfig, base: ModelConfig, report: Report
) -> SpeculatorFiles | None:
    """Open the speculator that the user asked for, if any.

    Raises:
        ModelNotFoundError, CheckpointError: see `arctic_jax.errors`.
        UnsupportedModelError: it is no speculator, or not one for the model.
        ValueError: it drafts fewer tokens than are wanted.
    """
    speculative = config.speculative
    if not speculative.uses_speculator:
        return None
    name = str(speculative.model)
    found, checkpoint = open_weights(
        name, speculative.revision, config.load.load_format == "dummy", report
    )
    cls = speculator_class(found)
    numbers = cls.config_from_hf(found)
    numbers.check_base(base, name, config.load.model)
    wanted = speculative.num_speculative_tokens
    if wanted is not None and wanted > numbers.n_predict:
        raise ValueError(
            f"speculative_config: num_speculative_tokens={wanted}, but the speculator {name!r} "
            f"drafts at most {numbers.n_predict}"
        )
    if checkpoint is not None and all(tensor.startswith(PREFIX) for tensor in checkpoint):
        checkpoint = Renamed(checkpoint, PREFIX)
    drafting = Drafting(
        cls, numbers, wanted or numbers.n_predict, speculative.disable_by_batch_size
    )
    return SpeculatorFiles(drafting, checkpoint)
