"""The mechanism of a private training: the parameters that determine what it reveals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmomentum.errors import ConfigError


@dataclass(frozen=True)
class Mechanism:
    """Steps of the Poisson-subsampled Gaussian mechanism (DP-SGD, Abadi et al., arXiv 1607.00133).

    In each step, every unit is sampled with probability `sample_rate`, its gradient is clipped to
    the norm `max_grad_norm`, and Gaussian noise with standard deviation
    `noise_multiplier * max_grad_norm` is added to the sum. Neighboring data sets differ by one
    unit (add or remove).

    Attributes:
        noise_multiplier: Standard deviation of the noise in units of the clipping norm.
        sample_rate: Probability with which a unit takes part in a step.
        num_steps: Number of steps.
        max_grad_norm: The norm to which a unit's gradient, over all parameters, is clipped.
        expected_batch: What the noised sum is divided by: a public number, not the sampled count.

    Raises:
        ConfigError: If a number is out of range.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int
    max_grad_norm: float
    expected_batch: float

    def __post_init__(self) -> None:
        """Reject parameters that do not give privacy."""
        # Not `value <= 0`, so that NaN is rejected too.
        for name in ("noise_multiplier", "max_grad_norm", "expected_batch"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} of a private training must be above 0; got {value}")
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(
                f"the sample rate of a private training must be in (0, 1]; got {self.sample_rate}"
            )
        if self.num_steps < 1:
            raise ConfigError(f"a private training has at least one step; got {self.num_steps}")


@dataclass(frozen=True)
class PrivateSettings:
    """The settings of a private training.

    Attributes:
        mechanism: The steps.
        units: The rows of each unit, by index.
        max_rows: The most rows per forward pass, however many are sampled.
    """

    mechanism: Mechanism
    units: tuple[tuple[int, ...], ...]
    max_rows: int


def group_units(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the rows of each unit, with units in order of first appearance.

    Args:
        names: The unit of each row; "" for a row that is its own unit.
    """
    # A row without a name is a unit keyed by its number, which no name can equal.
    rows_by_unit: dict[str | int, list[int]] = {}
    for row, name in enumerate(names):
        rows_by_unit.setdefault(name or row, []).append(row)
    return tuple(tuple(rows) for rows in rows_by_unit.values())
