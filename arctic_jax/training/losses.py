"""How far a student is from its teacher. Pure."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from arctic_jax.config import ModelConfig
from arctic_jax.training.forward import Batch, Hidden, Weights, logits

LOGIT_TOKENS = 512
"""Tokens of a row whose logits are there at once: for all of them memory would not do."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "divergence", "agreement", "teacher_nll", "student_nll"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Comparison:
    """Sums over the tokens that count, float32.

    Attributes:
        tokens: how many.
        divergence: KL divergence of the student's distribution from the teacher's, nats.
        agreement: of both likeliest tokens.
        teacher_nll: negative log-likelihood of the tokens that follow, nats.
        student_nll: likewise.
    """

    tokens: Array
    divergence: Array
    agreement: Array
    teacher_nll: Array
    student_nll: Array


def compare(
    weights: Weights,
    config: ModelConfig,
    batch: Batch,
    teacher: Array,
    student: Array,
    temperature: float = 1.0,
) -> Comparison:
    """Compare two models' predictions, from `[B, S, hidden]` after their last norms.

    Args:
        weights: with the output projection that both have.
        config: of either.
        batch: what they read.
        teacher: hidden states.
        student: hidden states.
        temperature: of both distributions in the divergence.
    """
    following = jnp.roll(batch.token_ids, -1, axis=1)  # the last one never counts

    @jax.checkpoint
    def part(teacher: Array, student: Array, target: Array, counts: Array) -> Comparison:
        t, s = (logits(weights, config, x) for x in (teacher, student))
        log_t, log_s = (jax.nn.log_softmax(x / temperature) for x in (t, s))
        divergence = (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
        nll = [
            -jnp.take_along_axis(jax.nn.log_softmax(x), target[..., None], -1)[..., 0]
            for x in (t, s)
        ]
        values = (jnp.ones_like(divergence), divergence, t.argmax(-1) == s.argmax(-1), *nll)
        return Comparison(*(jnp.where(counts, v, 0).sum(dtype=jnp.float32) for v in values))

    def step(total: Comparison, arguments: tuple[Array, ...]) -> tuple[Comparison, None]:
        return jax.tree.map(jnp.add, total, part(*arguments)), None

    # Along the sequence, so that each device keeps its rows.
    size = _divisor(batch.token_ids.shape[1], LOGIT_TOKENS)
    split = tuple(
        jnp.swapaxes(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 0, 1)
        for x in (teacher, student, following, batch.counts)
    )
    zero = jnp.zeros((), jnp.float32)
    return lax.scan(step, Comparison(zero, zero, zero, zero, zero), split)[0]


def hidden_error(batch: Batch, teacher: Hidden, student: Hidden) -> Array:
    """Mean squared difference of what goes into the last layer, over all tokens but padding."""
    difference = (teacher.before_last - student.before_last).astype(jnp.float32)
    real = (batch.segment_ids > 0)[..., None]
    squares = jnp.where(real, difference * difference, 0).sum()
    return squares / (real.sum() * difference.shape[-1])


def _divisor(length: int, most: int) -> int:
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)
