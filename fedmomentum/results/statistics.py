"""Means over a few seeds, with Student's t intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

# Number of halvings after which no float lies between the ends of an interval.
BISECTIONS = 200
# Far more than the continued fraction of the incomplete beta function needs to converge.
CONTINUED_FRACTION_TERMS = 200


@dataclass(frozen=True)
class MeanEstimate:
    """A mean over seeds with its uncertainty.

    Attributes:
        mean: The mean of the values.
        spread: Their sample standard deviation (n - 1); None for one value.
        low: Lower end of the 95 % t interval of the mean; None for one value.
        high: Its upper end; None for one value.
        count: The number of values.
    """

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    count: int


def estimate_mean(values: Sequence[float]) -> MeanEstimate | None:
    """Estimate a mean: `x̄ ± t s / √n` with `s = √(Σ (x - x̄)² / (n - 1))`.

    Args:
        values: One value per seed.

    Returns:
        The estimate, with t the 97.5 % quantile of Student's t at n - 1 degrees of freedom; None
        without values.
    """
    count = len(values)
    if count == 0:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return MeanEstimate(mean, None, None, None, 1)
    # The interval follows from the sample standard deviation.
    squared_deviations = math.fsum((value - mean) ** 2 for value in values)
    spread = math.sqrt(squared_deviations / (count - 1))
    half_width = t_quantile(0.975, count - 1) * spread / math.sqrt(count)
    return MeanEstimate(mean, spread, mean - half_width, mean + half_width, count)


@cache  # tables of many differences ask for the same few quantiles
def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Return the quantile of Student's t distribution at a probability in (0, 1)."""
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees_of_freedom)
    # Double the upper end until it exceeds the quantile, then bisect.
    low = 0.0
    high = 1.0
    while _t_cdf(high, degrees_of_freedom) < probability:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _t_cdf(middle, degrees_of_freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_cdf(t: float, degrees_of_freedom: int) -> float:
    """Compute `P(T <= t) = 1 - I(v / (v + t²); v / 2, 1 / 2) / 2` for t >= 0."""
    x = degrees_of_freedom / (degrees_of_freedom + t * t)
    return 1 - 0.5 * incomplete_beta(x, degrees_of_freedom / 2, 0.5)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Compute the regularized incomplete beta function I(x; a, b), x in [0, 1].

    Source:
        DLMF 8.17.22: `x^a (1 - x)^b / (a B(a, b))` times a continued fraction, which converges for
        x < (a + 1) / (a + b + 2); beyond, I(x; a, b) = 1 - I(1 - x; b, a).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    # The continued fraction, evaluated from its tail.
    fraction = 1.0
    for m in range(CONTINUED_FRACTION_TERMS, 0, -1):
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    # Compute its factor in logarithms, as the beta function overflows for large a and b.
    log_power = a * math.log(x) + b * math.log1p(-x)
    log_factor = log_power + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a)
    return math.exp(log_factor) / fraction
