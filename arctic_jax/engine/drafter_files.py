"""Finding what an engine is to draft with, and seeing that it fits. Engine start only."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from arctic_jax.config import EngineConfig, ModelConfig
from arctic_jax.engine.drafting import Drafting, ModelDrafting, SpeculatorDrafting
from arctic_jax.engine.suffix_matching import HybridDrafting, SuffixMatching
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.loading.model_files import ModelFiles, open_model, open_weights
from arctic_jax.loading.orbax_checkpoint import OrbaxCheckpoint
from arctic_jax.models.registry import model_class, speculator_class
from arctic_jax.models.speculator import DRAFT_TOKEN_IDS
from arctic_jax.progress import Report
from arctic_jax.speculative_config import SpeculativeConfig
from arctic_jax.weights import Checkpoint, Renamed

logger = logging.getLogger(__name__)

DRAFT_MODEL_TOKENS = 4
"""Tokens of a draft model's draft, unless the user says something else."""
PREFIX = "speculator."
"""Of all names in some speculators' checkpoints."""


@dataclass(frozen=True)
class DrafterFiles:
    """A drafter that fits its model.

    Attributes:
        drafting: what it is made of, and how much it drafts.
        checkpoint: its weights; `None` for random ones, or none.
    """

    drafting: Drafting
    checkpoint: Checkpoint | None


def open_drafter(
    config: EngineConfig, base_files: ModelFiles, base: ModelConfig, report: Report
) -> DrafterFiles | None:
    """Open the speculator or draft model that the user asked for, if any.

    Raises:
        ModelNotFoundError, CheckpointError: see `arctic_jax.errors`.
        UnsupportedModelError: it is none, or not one for the model.
        ValueError: it drafts fewer tokens than are wanted.
    """
    speculative = config.speculative
    if not speculative.drafts_on_device:
        return None
    if speculative.kind == "suffix":
        return DrafterFiles(_matching(speculative), None)
    if speculative.kind == "draft_model":
        files = _open_draft_model(config, base_files, base, report)
    else:
        files = _open_speculator(config, base, report)
    if not speculative.suffix_on_device:
        return files
    return replace(files, drafting=_hybrid(speculative, files.drafting))


def _matching(speculative: SpeculativeConfig) -> SuffixMatching:
    return SuffixMatching(
        speculative.num_matched_on_device,
        speculative.disable_by_batch_size,
        speculative.suffix_max_spec_factor,
        speculative.suffix_max_spec_offset,
    )


def _hybrid(speculative: SpeculativeConfig, other: Drafting) -> HybridDrafting:
    matching = _matching(speculative)
    if matching.num_tokens < other.num_tokens:
        raise ValueError(
            f"speculative_config: suffix_speculative_tokens={matching.num_tokens} are fewer "
            f"than the {other.num_tokens} of {speculative.model!r}"
        )
    return HybridDrafting(matching.num_tokens, matching.max_num_seqs, matching, other)


def _open_speculator(config: EngineConfig, base: ModelConfig, report: Report) -> DrafterFiles:
    speculative = config.speculative
    name = str(speculative.model)
    dummy = config.load.load_format == "dummy"
    found, checkpoint = open_speculator(name, speculative.revision, dummy, report)
    cls = speculator_class(found)
    numbers = cls.config_from_hf(found)
    numbers.check_base(base, name, config.load.model)
    wanted = speculative.num_speculative_tokens
    if wanted is not None and wanted > numbers.n_predict:
        raise ValueError(
            f"speculative_config: num_speculative_tokens={wanted}, but the speculator {name!r} "
            f"drafts at most {numbers.n_predict}"
        )
    if checkpoint is not None and numbers.draft_vocab_size is not None:
        numbers.check_draft_token_ids(checkpoint.read(DRAFT_TOKEN_IDS))
    drafting = SpeculatorDrafting(
        wanted or numbers.n_predict, speculative.disable_by_batch_size, cls, numbers
    )
    return DrafterFiles(drafting, checkpoint)


def open_speculator(
    model: str, revision: str | None, dummy: bool, report: Report
) -> tuple[dict[str, Any], Checkpoint | None]:
    """Return a speculator's config, and its checkpoint by names without `PREFIX`.

    For arguments and errors see `open_weights`.
    """
    config, checkpoint = open_weights(model, revision, dummy, report)
    if checkpoint is not None and all(tensor.startswith(PREFIX) for tensor in checkpoint):
        checkpoint = Renamed(checkpoint, PREFIX)
    return config, checkpoint


def _open_draft_model(
    config: EngineConfig, base_files: ModelFiles, base: ModelConfig, report: Report
) -> DrafterFiles:
    speculative, name = config.speculative, str(config.speculative.model)
    load = replace(config.load, model=name, revision=speculative.revision, tokenizer=None)
    files = open_model(load, report)
    cls = model_class(files.config)
    numbers = cls.config_from_hf(files.config)
    both = f"the draft model {name!r} does not fit the model {config.load.model!r}"
    if numbers.vocab_size != base.vocab_size:
        raise UnsupportedModelError(
            f"{both}: its vocabulary has {numbers.vocab_size} tokens, not {base.vocab_size}"
        )
    if _spellings(files) != _spellings(base_files):
        raise UnsupportedModelError(f"{both}: its tokenizer numbers tokens in another way")
    if isinstance(files.checkpoint, OrbaxCheckpoint):
        raise UnsupportedModelError(f"the draft model {name!r} is an Orbax checkpoint")
    positions = numbers.max_position_embeddings
    if positions < (config.load.max_model_len or base.max_position_embeddings):
        logger.warning(
            "the draft model %r was made for %d positions: drafts beyond will seldom be right",
            *(name, positions),
        )
    drafting = ModelDrafting(
        speculative.num_speculative_tokens or DRAFT_MODEL_TOKENS,
        speculative.disable_by_batch_size,
        cls,
        numbers,
        config.cache.block_size,
    )
    return DrafterFiles(drafting, files.checkpoint)


def _spellings(files: ModelFiles) -> dict[str, int]:
    return files.tokenizer.backend.get_vocab(with_added_tokens=True)
