"""A speculator whose heads know the frequent tokens only (FR-Spec: arXiv 2502.14856). Host only."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from arctic_jax.config import LoadConfig
from arctic_jax.engine.drafter_files import open_speculator
from arctic_jax.loading.model_files import new_directory, open_model
from arctic_jax.loading.tokenizer import Tokenizer
from arctic_jax.models.registry import model_class, speculator_class
from arctic_jax.models.speculator import DRAFT_TOKEN_IDS, SpeculatorConfig
from arctic_jax.progress import Report, silent
from arctic_jax.training import data, speculator_checkpoint


def reduce(
    speculator: str,
    load: LoadConfig,
    data_files: Sequence[Path],
    size: int,
    directory: Path,
    report: Report = silent,
) -> float:
    """Write a speculator with the rows of its heads that are worth reading; the rest as it is.

    Args:
        speculator: a folder or a hub id.
        load: the model that it is for.
        data_files: JSON lines, see `data`; the tokens that count are counted.
        size: N, tokens that are kept.
        directory: must not exist. It appears when everything is in it.
        report: told how far downloading is.

    Returns:
        The share of the counted tokens that are kept: no other can be drafted.

    Raises:
        FileExistsError: there is something at `directory`.
        ValueError: it has no heads of its own or reduced ones, N is no part of its vocabulary,
            or the data do not fit.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: see `arctic_jax.errors`.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} already exists")
    config, checkpoint = open_speculator(speculator, None, False, report)
    assert checkpoint is not None
    numbers = speculator_class(config).config_from_hf(config)
    _check(numbers, speculator, size)
    files = open_model(load, report)
    base = model_class(files.config).config_from_hf(files.config)
    numbers.check_base(base, speculator, load.model)
    counts = count_tokens(data_files, files.tokenizer)
    kept = most_frequent(counts, numbers.vocab_size, size, files.eos_token_ids)
    tensors = {name: checkpoint.read(name) for name in checkpoint}
    heads = tensors.keys() & {f"head.{i}.weight" for i in range(numbers.n_predict)}
    tensors |= {name: tensors[name][kept] for name in heads}
    tensors[DRAFT_TOKEN_IDS] = np.array(kept, np.int32)
    with new_directory(directory) as made:
        reduced = config | {"draft_vocab_size": size}
        speculator_checkpoint.save(reduced, tensors, made, dtype=None)
    return sum(counts[token] for token in kept) / counts.total()


def _check(numbers: SpeculatorConfig, name: str, size: int) -> None:
    if numbers.shares_head:
        raise ValueError(
            f"the speculator {name!r} uses the model's head and has none that could be reduced"
        )
    if numbers.draft_vocab_size is not None:
        raise ValueError(
            f"the speculator {name!r} has been reduced to {numbers.draft_vocab_size} tokens"
        )
    if not 1 <= size < numbers.vocab_size:
        raise ValueError(
            f"size must be at least 1 and less than the vocabulary's {numbers.vocab_size}, "
            f"got {size}"
        )


def count_tokens(data_files: Sequence[Path], tokenizer: Tokenizer) -> Counter[int]:
    """Return how often each token is one that counts.

    Raises:
        ValueError: a line is neither a conversation nor a text, or no token counts.
    """
    counts: Counter[int] = Counter()
    for path in data_files:
        for sample in data.read_samples(path, tokenizer):
            counts.update(itertools.compress(sample.token_ids, sample.counts))
    if not counts:
        raise ValueError(f"{', '.join(map(str, data_files))}: there is no token that counts")
    return counts


def most_frequent(
    counts: Counter[int], vocab_size: int, size: int, always: Collection[int]
) -> list[int]:
    """Return so many tokens of a vocabulary, ascending; of equally frequent ones the lowest.

    Before all others those in `always`: an answer has one end, however long it is.
    """
    ranked = sorted(range(vocab_size), key=lambda token: (token not in always, -counts[token]))
    return sorted(ranked[:size])
