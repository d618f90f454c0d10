"""An encoder on its device: weights, programs, and one batch at a time.

After the constructor nothing is compiled any more. Any thread may launch.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from arctic_jax import weights
from arctic_jax.config import LoadConfig
from arctic_jax.embedding.packing import bucket_ladder
from arctic_jax.embedding.pooling import normalize, pool
from arctic_jax.embedding.row_copies import RowCopies
from arctic_jax.embedding.settings import EmbeddingSettings
from arctic_jax.encoder_batch import EncoderBucket, pack, unpack
from arctic_jax.engine import program_store
from arctic_jax.engine.program_store import ProgramStore
from arctic_jax.errors import UnsupportedModelError
from arctic_jax.models.bert import BertModel, EncoderConfig
from arctic_jax.models.decoder_encoder import DecoderEncoder, DecoderEncoderConfig
from arctic_jax.models.layers import named_parameters
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.pallas_kernels.segment_attention.op import skips_other_segments
from arctic_jax.progress import Report, counted, passing, silent
from arctic_jax.shift_parallel import make_mesh
from arctic_jax.weights import Checkpoint, ParameterSpec, Renamed

logger = logging.getLogger(__name__)

Encoder = BertModel | DecoderEncoder
Numbers = EncoderConfig | DecoderEncoderConfig
MAX_TOKENS = {"cpu": 1024, "gpu": 32768}
"""Tokens of a batch, by back end: where more do not make a token cheaper."""


class EncoderRunner:
    """Loads an encoder and runs its batches.

    Args:
        load: what the user set.
        max_tokens: of a batch; `None` for `MAX_TOKENS`.
        model_class: from the registry.
        model_config: the encoder's numbers.
        settings: what follows the encoder.
        checkpoint: where weights come from; `None` for random ones.
        report: told how far loading and compiling are.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says.
        ValueError: `max_model_len` is more than the encoder has positions.
    """

    def __init__(
        self,
        load: LoadConfig,
        max_tokens: int | None,
        model_class: type[Any],
        model_config: Numbers,
        settings: EmbeddingSettings,
        checkpoint: Checkpoint | None,
        report: Report = silent,
    ) -> None:
        self.settings = settings
        self.model_config = model_config
        self.dimension = model_config.hidden_size
        self.max_length = _max_length(load.max_model_len, model_config, settings)
        self.mesh = make_mesh(1, 1)
        platform = self.mesh.devices.flat[0].platform
        self.dtype = jnp.dtype(_fastest_dtype(platform) if load.dtype == "auto" else load.dtype)
        self.ladder = bucket_ladder(
            max_tokens or MAX_TOKENS.get(platform, 32768),
            self.max_length,
            skips_other_segments=skips_other_segments(
                self.dtype, model_config.head_dim, load.implementation
            ),
        )
        model = nnx.eval_shape(lambda: model_class(model_config, load.implementation))
        self._structure = jax.tree.structure(model)
        self._leaves = self._load(model, checkpoint, load.seed, report)
        self._store = ProgramStore(
            program_store.default_directory(),
            self.mesh.devices.flatten().tolist(),
            (model_class.__name__, model_config, settings.pooling, settings.normalize),
            (load.implementation, dispatch.interpreter(), self.dtype),
        )
        self._programs = self._compile(report)
        self._copies = None
        if platform != "cpu":  # the host reads a CPU's memory
            self._copies = RowCopies(self.ladder, self.mesh, self.dimension)
        self._warm_up()

    def launch(self, windows: Sequence[Sequence[Sequence[int]]], bucket: EncoderBucket) -> Array:
        """Start a batch of token ids; return its vectors `[.., dimension]`, still on their way.

        Row by row they are those of the sequences in their order; the rest is meaningless.
        """
        return self.launch_packed(pack(windows, bucket), bucket, sum(map(len, windows)))

    def launch_packed(self, packed: np.ndarray, bucket: EncoderBucket, count: int) -> Array:
        """Start a batch of `count` sequences that `pack` has packed."""
        vectors = self._programs[bucket](self._leaves, packed)
        return self._copies.start(vectors, bucket, count) if self._copies else vectors

    def program_text(self, bucket: EncoderBucket) -> str:
        """Return what XLA made of a batch's program."""
        return self._programs[bucket].as_text() or ""

    def _load(
        self, model: Encoder, checkpoint: Checkpoint | None, seed: int, report: Report
    ) -> tuple[Array, ...]:
        parameters = {
            path: ParameterSpec(variable.shape, self.dtype, PartitionSpec())
            for path, variable in named_parameters(model).items()
        }
        if checkpoint is None:
            placed = weights.random(parameters, self.mesh, seed)
        else:
            renamed = _renamed(model, checkpoint)
            placed = weights.load(parameters, model.weight_sources(), renamed, self.mesh)
        advance = counted(report, "Loading weights", len(parameters))
        return tuple(array for _, array in passing(placed, advance))

    def _run(self, leaves: tuple[Array, ...], packed: Array, bucket: EncoderBucket) -> Array:
        """Compute a batch: the program of `bucket`."""
        model: Encoder = jax.tree.unflatten(self._structure, leaves)
        batch = unpack(packed, bucket)
        vectors = pool(model(batch, bucket.window), batch, self.settings.pooling)
        return normalize(vectors) if self.settings.normalize else vectors

    def _compile(self, report: Report) -> dict[EncoderBucket, Compiled]:
        """Have a program for every shape, from the store or compiled on a few threads."""
        start = time.perf_counter()
        advance = counted(report, "Compiling encoder programs", len(self.ladder))
        programs, jobs = {}, {}
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            for bucket in self.ladder:
                arguments = self._arguments(bucket)
                result = jax.ShapeDtypeStruct((), jnp.float32)  # only its structure is looked at
                program = self._store.load(bucket, arguments, result)
                if program is not None:
                    programs[bucket] = program
                    advance()
                    continue
                lowered = jax.jit(self._run, static_argnums=2).lower(*arguments, bucket)
                jobs[bucket] = threads.submit(self._compile_lowered, bucket, lowered)
                jobs[bucket].add_done_callback(lambda _: advance())
            programs |= {bucket: job.result() for bucket, job in jobs.items()}
        seconds = time.perf_counter() - start
        logger.info("%d encoder programs, %d compiled: %.1f s", len(programs), len(jobs), seconds)
        return programs

    def _compile_lowered(self, bucket: EncoderBucket, lowered: jax.stages.Lowered) -> Compiled:
        program = lowered.compile()
        self._store.save(bucket, program)
        return program

    def _arguments(self, bucket: EncoderBucket) -> tuple[Any, ...]:
        replicated = NamedSharding(self.mesh, PartitionSpec())
        packed = jax.ShapeDtypeStruct((bucket.packed_size,), jnp.int32, sharding=replicated)
        return self._leaves, packed

    def _warm_up(self) -> None:
        """Run every program once: on a GPU the first run makes its graph."""
        if self.mesh.devices.flat[0].platform == "gpu":
            for bucket in self.ladder:
                self.launch([], bucket).block_until_ready()


def _fastest_dtype(platform: str) -> str:
    """Return bfloat16, but float32 on a processor without instructions for its products.

    With them a product takes half the time of one in float32, without them many times as long.
    """
    if platform != "cpu":
        return "bfloat16"
    try:
        features = _PROCESSOR.read_text().split()
    except OSError:  # not Linux
        return "float32"
    return "bfloat16" if "avx512_bf16" in features else "float32"


_PROCESSOR = Path("/proc/cpuinfo")


def _max_length(wanted: int | None, model_config: Numbers, settings: EmbeddingSettings) -> int:
    """Return the tokens of the longest text: what is wanted, if there are so many positions."""
    positions = model_config.max_positions
    if wanted is not None and wanted > positions:
        raise ValueError(f"max_model_len={wanted} is more than the model's {positions} positions")
    return wanted or min(settings.max_length or model_config.usual_length, positions)


def _renamed(model: Encoder, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with our names."""
    for prefix in model.prefixes:
        if f"{prefix}{model.first_tensor}" in checkpoint:
            return Renamed(checkpoint, prefix, model.prefixes[0])
    raise UnsupportedModelError(
        f"no tensor is called {model.first_tensor!r} with any of {model.prefixes} before it"
    )
