"""How far a student is from its teacher. Pure."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from arctic_jax.config import ModelConfig
from arctic_jax.training.forward import Batch, Hidden, Weights, logits, project

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
    weights: Weights, config: ModelConfig, batch: Batch, teacher: Array, student: Array
) -> Comparison:
    """Compare two models' predictions, from `[B, S, hidden]` after their last norms.

    Args:
        weights: with the output projection that both have.
        config: of either.
        batch: what they read.
        teacher: hidden states.
        student: hidden states.
    """
    following = jnp.roll(batch.token_ids, -1, axis=1)  # the last one never counts

    def part(teacher: Array, student: Array, target: Array, counts: Array) -> Comparison:
        t, s = (logits(weights, config, x) for x in (teacher, student))
        log_t, log_s = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
        divergence = (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
        nll = [-jnp.take_along_axis(x, target[..., None], -1)[..., 0] for x in (log_t, log_s)]
        values = (jnp.ones_like(divergence), divergence, t.argmax(-1) == s.argmax(-1), *nll)
        return Comparison(*(_sum_where(counts, v) for v in values))

    def step(total: Comparison, arguments: tuple[Array, ...]) -> tuple[Comparison, None]:
        return jax.tree.map(jnp.add, total, part(*arguments)), None

    zero = jnp.zeros((), jnp.float32)
    parts = _parts(teacher, student, following, batch.counts)
    return lax.scan(step, Comparison(zero, zero, zero, zero, zero), parts)[0]


def divergence(
    student: Array, teacher: Array, fixed: tuple[Array, Array], temperature: float
) -> tuple[Array, Array]:
    """KL divergence of softened predictions, with a gradient for the student alone.

    Logits are the memory of a distillation. They are computed once, for a part of the tokens at a
    time, and the gradient with them, instead of again on the way back.

    Args:
        student: `[B, S, hidden]`, after the last norm.
        teacher: likewise.
        fixed: the output projection `[vocab, hidden]` of both, and which tokens count `[B, S]`.
        temperature: T of both distributions.

    Returns:
        Sums over the tokens that count, float32: of KL(teacher ‖ student) in nats, and of
        agreement, which has no gradient.
    """
    return _differentiable(student, teacher, fixed, temperature)


def _value(
    student: Array, teacher: Array, fixed: tuple[Array, Array], temperature: float
) -> tuple[Array, Array]:
    return _forward(student, teacher, fixed, temperature)[0]


def _forward(
    student: Array, teacher: Array, fixed: tuple[Array, Array], temperature: float
) -> tuple[tuple[Array, Array], Array]:
    head, counts = fixed

    def step(
        total: tuple[Array, Array], part: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        *hidden, counts = part
        t, s = (project(head, x) / temperature for x in hidden)
        sums = [jax.nn.logsumexp(x, axis=-1) for x in (t, s)]
        p, q = (jnp.exp(x - sum_[..., None]) for x, sum_ in zip((t, s), sums, strict=True))
        kl = (p * (t - s)).sum(-1) - sums[0] + sums[1]
        agreement = t.argmax(-1) == s.argmax(-1)
        error = jnp.where(counts[..., None], (q - p) / temperature, 0).astype(head.dtype)
        found = (total[0] + _sum_where(counts, kl), total[1] + _sum_where(counts, agreement))
        return found, jnp.einsum("bsv,vd->bsd", error, head)

    zero = jnp.zeros((), jnp.float32)
    total, gradients = lax.scan(step, (zero, zero), _parts(teacher, student, counts))
    return total, jnp.swapaxes(gradients, 0, 1).reshape(student.shape)


def _backward(
    _temperature: float, gradient: Array, cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    return (cotangents[0] * gradient).astype(gradient.dtype), None, None


_differentiable = jax.custom_vjp(_value, nondiff_argnums=(3,))
_differentiable.defvjp(_forward, _backward)


def hidden_error(batch: Batch, teacher: Hidden, student: Hidden) -> Array:
    """Mean squared difference of what goes into the last layer, over all tokens but padding."""
    difference = (teacher.before_last - student.before_last).astype(jnp.float32)
    real = (batch.segment_ids > 0)[..., None]
    squares = jnp.where(real, difference * difference, 0).sum()
    return squares / (real.sum() * difference.shape[-1])


def _parts(*arrays: Array) -> tuple[Array, ...]:
    """Split each `[B, S, ...]` along the sequence: each device keeps its rows."""
    size = divisor(arrays[0].shape[1], LOGIT_TOKENS)
    return tuple(jnp.swapaxes(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 0, 1) for x in arrays)


def _sum_where(counts: Array, values: Array) -> Array:
    return jnp.where(counts, values, 0).sum(dtype=jnp.float32)


def divisor(length: int, most: int) -> int:
    """Return the largest divisor of `length` that is at most `most`."""
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)
