"""The (epsilon, delta) privacy cost of composed steps of the subsampled Gaussian mechanism.

Neighboring data sets differ by one unit (add or remove). The values come from Opacus's accountant
based on privacy loss random variables (Gopi et al., arXiv 2106.02848), an upper bound; if that
would need too much memory, they come from its Renyi accountant, which gives larger values. They
hold for steps whose settings were chosen without looking at the outcomes of earlier steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fedmomentum.errors import ConfigError

ORDERS = (*range(2, 65), 96, 128, 256, 512)
"""Orders of the Renyi divergence: integers, which are fast and lose little."""
LARGEST_EPSILON = 1000.0
"""Beyond this, nothing is protected, and the exact value is not worth its cost."""
MAX_GRID = 2**20
"""Points of a discretized privacy loss: a few hundred MB during composition."""
SMALLEST_ERROR = 1e-3
LARGEST_ERROR = 0.1
MAX_NOISE = 1e4
"""The largest noise multiplier that is searched for."""
NOISE_RTOL = 2e-3


@dataclass(frozen=True, order=True)
class Steps:
    """Steps with identical settings.

    Attributes:
        noise_multiplier: Standard deviation of the noise in units of the clipping norm.
        sample_rate: Probability with which a unit takes part in a step.
        num_steps: Number of steps.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int


def epsilon_of(history: Iterable[Steps], delta: float) -> float:
    """Return an upper bound on the total epsilon of all steps; infinity if there is none.

    Args:
        history: The steps, in any order.
        delta: The delta at which epsilon is computed.

    Raises:
        ConfigError: If Opacus is not installed.
    """
    merged = _merged(history)
    if not merged:
        return 0.0
    renyi = _renyi_epsilon(merged, delta)
    if not renyi <= LARGEST_EPSILON:
        return renyi
    return min(renyi, _numerical_epsilon(merged, delta, renyi))


def fits(history: Iterable[Steps], epsilon: float, delta: float) -> bool:
    """Return whether steps stay within a budget, using the faster bound if that suffices."""
    merged = _merged(history)
    if not merged or _renyi_epsilon(merged, delta) <= epsilon:
        return True
    return epsilon_of(merged, delta) <= epsilon


@lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Return approximately the smallest noise multiplier that keeps steps within a budget.

    Args:
        epsilon: The budget's epsilon.
        delta: The budget's delta.
        sample_rate: Probability with which a unit takes part in a step.
        num_steps: Number of steps.

    Raises:
        ConfigError: If no noise multiplier up to `MAX_NOISE` suffices.
    """

    def renyi_suffices(noise: float) -> bool:
        return _renyi_epsilon([Steps(noise, sample_rate, num_steps)], delta) <= epsilon

    def suffices(noise: float) -> bool:
        return fits([Steps(noise, sample_rate, num_steps)], epsilon, delta)

    # Start with the fast bound, which requires somewhat more noise than the other.
    high = 0.5
    while not renyi_suffices(high):
        high *= 2
        if high > MAX_NOISE:
            raise ConfigError(
                f"no noise up to {MAX_NOISE:g} times the clipping norm keeps {num_steps} steps at "
                f"a sample rate of {sample_rate:g} within epsilon {epsilon:g} at delta {delta:g}: "
                "raise epsilon, or train fewer steps"
            )
    high = _bisect(renyi_suffices, 0.0, high)
    low = 0.75 * high
    if suffices(low):
        return _bisect(suffices, 0.0, low)
    return _bisect(suffices, low, high)


def _bisect(suffices: Callable[[float], bool], low: float, high: float) -> float:
    """Return approximately the smallest number above `low` that suffices, if `high` does."""
    while high - low > NOISE_RTOL * high:
        middle = (low + high) / 2
        if suffices(middle):
            high = middle
        else:
            low = middle
    return high


def _merged(history: Iterable[Steps]) -> list[Steps]:
    """Return the steps, merging those with identical settings."""
    counts: dict[tuple[float, float], int] = {}
    for steps in history:
        key = (steps.noise_multiplier, steps.sample_rate)
        counts[key] = counts.get(key, 0) + steps.num_steps
    return [Steps(noise, rate, count) for (noise, rate), count in sorted(counts.items())]


def _triples(history: Sequence[Steps]) -> list[tuple[float, float, int]]:
    """Return the steps in Opacus's format."""
    return [(one.noise_multiplier, one.sample_rate, one.num_steps) for one in history]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of Opacus and NumPy about overflows, which give infinities here."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _renyi_epsilon(history: Sequence[Steps], delta: float) -> float:
    """Return the Renyi accountant's bound; infinity on overflow."""
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise ConfigError(
            "differential privacy needs the package opacus: pip install 'fedmomentum[privacy]'"
        ) from error
    accountant = RDPAccountant()
    accountant.history = _triples(history)
    try:
        with _quiet():
            epsilon = float(accountant.get_epsilon(delta, alphas=list(ORDERS)))
    except (ArithmeticError, ValueError):
        return math.inf
    return math.inf if math.isnan(epsilon) else max(epsilon, 0.0)


def _half_width(history: Sequence[Steps], delta_error: float) -> float:
    """Return the half-width that a grid of privacy losses needs: Gopi et al., remark 5.6."""
    # The privacy loss of all steps together, and of each step alone.
    num_steps = sum(one.num_steps for one in history)
    width = _renyi_epsilon(history, delta_error / 4)
    for one in history:
        single = Steps(one.noise_multiplier, one.sample_rate, 1)
        width = max(width, _renyi_epsilon([single], delta_error / (8 * num_steps)))
    return width + 3


def _numerical_epsilon(history: Sequence[Steps], delta: float, renyi: float) -> float:
    """Return the numerical accountant's bound; infinity if it cannot compute one."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain

    # The accepted error determines the mesh, which is coarser if memory would not suffice.
    delta_error = delta / 1000
    half_width = _half_width(history, delta_error)
    num_steps = sum(one.num_steps for one in history)
    mesh_factor = math.sqrt(num_steps * math.log(12 / delta_error) / 2)
    error = min(max(renyi / 200, SMALLEST_ERROR), LARGEST_ERROR)
    error = max(error, 2 * half_width * mesh_factor / MAX_GRID)
    if error > LARGEST_ERROR:
        return math.inf

    class Accountant(PRVAccountant):  # type: ignore[misc]
        """Opacus's accountant on this grid, since its own search for one takes a second."""

        def _get_domain(self, **_: Any) -> Any:
            return Domain.create_aligned(-half_width, half_width, error / mesh_factor)

    # This is an upper bound, since Opacus adds the error to its estimate.
    accountant = Accountant()
    accountant.history = _triples(history)
    try:
        with _quiet():
            epsilon = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta_error))
    except (ArithmeticError, ValueError, RuntimeError, MemoryError):
        return math.inf
    return math.inf if math.isnan(epsilon) else max(epsilon, 0.0)
