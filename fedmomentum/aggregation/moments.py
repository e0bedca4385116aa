r"""Optimizer moments of LoRA factors: their mean over clients, carried through aggregation.

The gradient of A is `s B^T G` and that of B is `s G A^T`, where G is the gradient of the effective
weight. So if aggregation replaces the factors `(B, A)` by `(B / f R^T, f R A)`, with an orthogonal
R, the gradients that the moments describe become those of the new factors by::

    A:  first -> f_B R first,          second -> f_B^2 (R o R) second
    B:  first -> f_A first R^T,        second -> f_A^2 second (R o R)^T

with `f_B = ||B_new|| / ||B_old||`, `f_A = ||A_new|| / ||A_old||`, and `o` the elementwise product.
The first moments are exact if the new factors are a rotation of the old ones; the second moments
treat gradients of different rows as uncorrelated.

This is in no paper we know of. FedAdamW (arXiv 2510.27486) averages second moments of complete
models, which have no gauge; FedGaLore (arXiv 2602.01746) synchronizes them in a projected space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank


@dataclass(frozen=True, eq=False)
class Moments:
    """What an optimizer remembers of one parameter.

    Attributes:
        first: The running mean of the gradient, in the parameter's shape: Adam's `exp_avg`, SGD's
            `momentum_buffer`.
        second: The running mean of its square, Adam's `exp_avg_sq`; None for SGD.
        step: The number of optimizer steps behind them.
    """

    first: Tensor
    second: Tensor | None
    step: int


@dataclass(frozen=True)
class OptimizerSettings:
    """The constants of the clients' optimizer that its moments depend on.

    Attributes:
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.
        epsilon: What Adam adds to the root of the second moment.
        weight_decay: Weight decay, in units of the learning rate: decoupled in AdamW, part of the
            gradient in SGD.
        momentum: Decay of SGD's buffer.
        gradient_norm: The largest norm of what a gradient adds to SGD's buffer in one step, without
            the decay; infinite if gradients are not clipped.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    gradient_norm: float = math.inf

    @property
    def max_movement(self) -> float:
        """The farthest Adam can move an element in one step, in units of the learning rate.

        With `rho = beta1^2 / beta2`, it is `(1 - beta1) / sqrt((1 - beta2) (1 - rho))`, whatever
        the gradients: by the Cauchy-Schwarz inequality, `m^2 <= v (1 - beta1)^2 / (1 - beta2) *
        sum_k rho^k`. It is at least 1, and infinite if `rho >= 1`: then old gradients never fade
        from m, relative to v.
        """
        if self.beta1**2 >= self.beta2:
            return math.inf
        rho = self.beta1**2 / self.beta2
        return max(1.0, (1 - self.beta1) / math.sqrt((1 - self.beta2) * (1 - rho)))


# ── the mean over clients ─────────────────────────────────────────────────────────────────────────


def mean_moments(moments: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Return `sum_i w_i first_i`, `sum_i w_i second_i` and the rounded mean step, in float64."""
    first = torch.zeros_like(moments[0].first, dtype=CORE_DTYPE)
    second = None
    if moments[0].second is not None:
        second = torch.zeros_like(moments[0].second, dtype=CORE_DTYPE)
    for moment, weight in zip(moments, weights, strict=True):
        first.add_(moment.first, alpha=weight)
        if second is not None and moment.second is not None:
            second.add_(moment.second, alpha=weight)
    return Moments(first, second, mean_step([moment.step for moment in moments], weights))


def mean_step(steps: Sequence[int], weights: Sequence[float]) -> int:
    """Return the weighted mean number of steps, rounded, at least 1."""
    mean = sum(weight * step for step, weight in zip(steps, weights, strict=True))
    return max(1, round(mean))


@dataclass(frozen=True, eq=False)
class SecondMomentMeans:
    """A second moment `(m, n)` represented by its row and column means, `m + n` numbers.

    Attributes:
        rows: `(m,)`, the mean of each row.
        columns: `(n,)`, the mean of each column.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, second: Tensor) -> SecondMomentMeans:
        """Return the means of a second moment."""
        return cls(second.mean(dim=1), second.mean(dim=0))

    def expand(self) -> Tensor:
        """Return `rows columns^T / mean(rows)` `(m, n)`, in float64.

        Its row and column means are the given ones; this is Adafactor's estimate (Shazeer and
        Stern, arXiv 1804.04235, section 3).
        """
        rows = self.rows.to(CORE_DTYPE)
        columns = self.columns.to(CORE_DTYPE)
        mean = rows.mean()
        if not float(mean) > 0:
            return torch.zeros(len(rows), len(columns), dtype=CORE_DTYPE, device=rows.device)
        return torch.outer(rows, columns) / mean


def reconstruct_moments(
    displacement: Tensor,
    start: Tensor,
    second: Tensor | None,
    step: int,
    settings: OptimizerSettings,
) -> Moments:
    r"""Return the moments that explain how far a parameter moved per unit of learning rate.

    In one step, AdamW moves a parameter x by `-lr (m' / (sqrt(v') + eps) + decay x)`, where
    `m' = m / (1 - beta1^t)` and `v' = v / (1 - beta2^t)`. If the mean of that over a round is
    `lr D`, then::

        m = -(D + decay x) (sqrt(v / (1 - beta2^t)) + eps) (1 - beta1^t)

    SGD moves x by `-lr` times its buffer, which contains the decay, so `m = -D`. Nothing is limited
    here; see `limit_first_moment`.

    Args:
        displacement: D, the weighted mean of each client's `(x_end - x_start) / sum of its learning
            rates`.
        start: x at the start of the round.
        second: v, the mean second moment; None for SGD.
        step: t, the number of steps behind the moments.
        settings: The optimizer's constants.
    """
    if second is None:
        return Moments(-displacement, None, step)
    movement = displacement + settings.weight_decay * start
    root = _adam_denominator(second, step, settings)
    return Moments(-movement * root * (1 - settings.beta1**step), second, step)


def _adam_denominator(second: Tensor, step: int, settings: OptimizerSettings) -> Tensor:
    """Return `sqrt(v / (1 - beta2^t)) + eps`, by which Adam divides the first moment."""
    return (second / (1 - settings.beta2**step)).sqrt() + settings.epsilon


def limit_first_moment(
    moments: Moments, start: Tensor, before: Tensor | None, settings: OptimizerSettings
) -> Moments:
    """Limit a mean first moment to what an optimizer can arrive at.

    Otherwise one client that reports a false moment, or too small a sum of learning rates, would
    make everyone's next step too long. Adam's elements are limited to what moves a parameter by
    `OptimizerSettings.max_movement` learning rates.

    SGD's buffer is limited in its norm: with clipped gradients it never exceeds
    `(gradient_norm + decay ||x||) / (1 - momentum)`, or what it was before the round if that is
    more.

    Args:
        moments: The mean over the clients of one parameter's moments.
        start: The parameter at the start of the round.
        before: Its first moment at the start of the round; None for zeros.
        settings: The optimizer's constants.
    """
    first = moments.first
    if moments.second is not None:
        if math.isinf(settings.max_movement):
            return moments
        root = _adam_denominator(moments.second, moments.step, settings)
        largest = settings.max_movement * root * (1 - settings.beta1**moments.step)
        return Moments(first.clamp(-largest, largest), moments.second, moments.step)
    if not 0 <= settings.momentum < 1:  # old gradients never fade
        return moments
    decayed = settings.weight_decay * _norm(start)
    largest_norm = (settings.gradient_norm + decayed) / (1 - settings.momentum)
    if before is not None:
        largest_norm = max(largest_norm, _norm(before))
    norm = _norm(first)
    if norm <= largest_norm:
        return moments
    return Moments(first * (largest_norm / norm), None, moments.step)


# ── through aggregation ───────────────────────────────────────────────────────────────────────────


def carry_moments(
    moments: Mapping[str, Moments], before: LowRank, after: LowRank
) -> dict[str, Moments]:
    """Transform one module's moments to other factors of nearly the same product.

    Args:
        moments: `B` and `A` to their moments; a factor may be missing.
        before: The factors that the moments belong to.
        after: The factors to transform them to, of the same shapes.

    Returns:
        The transformed moments; unchanged if the factors are identical bit for bit.
    """
    if torch.equal(before.B, after.B) and torch.equal(before.A, after.A):
        return dict(moments)
    rotation = gauge_rotation(before, after)
    squares = rotation.square()
    scale_B = _norm_ratio(after.B, before.B)
    scale_A = _norm_ratio(after.A, before.A)
    carried = {}
    for kind, moment in moments.items():
        first = moment.first.to(CORE_DTYPE)
        second = None if moment.second is None else moment.second.to(CORE_DTYPE)
        # The gradient of A has a factor B, and the gradient of B a factor A.
        if kind == "A":
            first = scale_B * (rotation @ first)
            second = None if second is None else scale_B**2 * (squares @ second)
        else:
            first = scale_A * (first @ rotation.mT)
            second = None if second is None else scale_A**2 * (second @ squares.mT)
        carried[kind] = Moments(first, second, moment.step)
    return carried


def gauge_rotation(before: LowRank, after: LowRank) -> Tensor:
    """Return the orthogonal `R` `(r, r)` that brings one pair of factors closest to another.

    It minimizes `||R A_before - A_after||_F^2 + ||B_before R^T - B_after||_F^2`: `R = X Y^T` with
    `X Sigma Y^T = svd(A_after A_before^T + B_after^T B_before)`. For the `procrustes` split it is
    the identity if the sum has all r directions: that matrix is then symmetric positive definite.
    R may include a reflection, which costs nothing: the sign of a row of A and of the column of B
    that belongs to it is as arbitrary as their direction.
    """
    alignment = after.A.to(CORE_DTYPE) @ before.A.to(CORE_DTYPE).mT
    alignment = alignment + after.B.to(CORE_DTYPE).mT @ before.B.to(CORE_DTYPE)
    X, _, Yh = torch.linalg.svd(alignment)
    rotation: Tensor = X @ Yh
    return rotation


def _norm_ratio(after: Tensor, before: Tensor) -> float:
    """Return the ratio of the Frobenius norms; 1 if `before` is zero."""
    size = _norm(before)
    return _norm(after) / size if size else 1.0


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=CORE_DTYPE))
