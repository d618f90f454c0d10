"""A model that says what it is told to, and works for it as if it had thought of that itself.

`speculation.py` replays recorded answers with it. The tokens are forced on the device, so that
steps can be launched ahead, and drafters on the device draft from the recorded text.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from arctic_jax.batch import ForwardBatch
from arctic_jax.engine import core
from arctic_jax.kv_cache import KVCache
from arctic_jax.models.llama import LlamaForCausalLM
from arctic_jax.shift_parallel import MeshLayout

_SCRIPT = "ARCTIC_JAX_FORCED_ANSWERS"  # programs are lowered in other processes, too
_SURE = 1e4


def force(jobs: Sequence[tuple[Sequence[int], Sequence[int] | None]]) -> None:
    """Have Llama models say these answers to these prompts.

    The seed of a request is the index of its job. Jobs without an answer, and seeds beyond, get the
    model's own.
    """
    longest = max((len(prompt) + len(answer or ()) for prompt, answer in jobs), default=0)
    script = np.full((len(jobs) + 1, longest + 1), -1, np.int32)
    for row, (prompt, answer) in zip(script, jobs, strict=False):
        row[len(prompt) : len(prompt) + len(answer or ())] = answer or ()
    path = Path(tempfile.mkdtemp()) / "script.npy"
    np.save(path, script)
    os.environ[_SCRIPT] = str(path)
    core.model_class = lambda config: ForcedLlamaForCausalLM  # pyright: ignore
    # Nothing tells stored programs with one script from those with another.
    jax.config.update("jax_compilation_cache_dir", str(path.parent))


class ForcedLlamaForCausalLM(LlamaForCausalLM):
    """See `force`."""

    def hidden_states(
        self, batch: ForwardBatch, cache: KVCache, layout: MeshLayout
    ) -> tuple[Array, KVCache]:
        """See `LlamaForCausalLM`; notes what the rows are to say."""
        script = jnp.asarray(np.load(os.environ[_SCRIPT]))
        job = jnp.clip(batch.seed[batch.row_seq, 0], 0, len(script) - 1)
        after = batch.positions[jnp.maximum(batch.logit_rows, 0)] + 1
        _forced.append(script[job, jnp.minimum(after, script.shape[1] - 1)])
        return super().hidden_states(batch, cache, layout)

    def logits(self, x: Array, layout: MeshLayout) -> Array:
        """See `LlamaForCausalLM`."""
        logits = super().logits(x, layout)
        is_forced = jnp.arange(logits.shape[1]) == _forced.pop()[:, None]
        return jnp.where(is_forced, _SURE, logits)


_forced: list[Array] = []  # of the step that is being traced
