"""Means over a few seeds and what they can decide: spreads, paired differences, Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        spread: their sample standard deviation (n - 1); None for one value.
        low: lower end of the 95 % t-interval of the mean; None for one value.
        high: its upper end.
        count: how many values.
    """

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    count: int


def mean_of(values: Sequence[float]) -> Mean | None:
    """`x̄`, `s = √(Σ (x - x̄)² / (n - 1))` and `x̄ ± t s / √n`, t the 97.5 % quantile at n - 1; None of no values."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, None, None, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(0.975, count - 1) * spread / math.sqrt(count)
    return Mean(mean, spread, mean - half, mean + half, count)


def t_quantile(share: float, freedom: int) -> float:
    """The value below which Student's t with `freedom` degrees of freedom falls with probability `share` in (0, 1)."""
    if share < 0.5:
        return -t_quantile(1 - share, freedom)
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < share:
        high *= 2
    for _ in range(200):  # halved until nothing is left between them
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    """`P(T <= t) = 1 - I(v / (v + t²); v / 2, 1 / 2) / 2` for t >= 0."""
    return 1 - 0.5 * incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I(x; a, b), x in [0, 1].

    Source:
        DLMF 8.17.22: `x^a (1 - x)^b / (a B(a, b))` times a continued fraction, which converges for
        x < (a + 1) / (a + b + 2); beyond, I(x; a, b) = 1 - I(1 - x; b, a). Evaluated from its tail.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    fraction = 1.0
    for m in range(200, 0, -1):
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a)
    return math.exp(front) / fraction
