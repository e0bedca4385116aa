"""What a task says about differentially private training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from fedmomentum.protocol.adapter_terms import Positive
from fedmomentum.utils.schema import Label, PositiveCount, Schema

if TYPE_CHECKING:
    from fedmomentum.config.privacy import DPConfig

EXAMPLE = "example"
"""The unit of privacy if no column names one."""


class PrivateTerms(Schema, frozen=True, kw_only=True):
    """How a client trains privately; the same for all clients and rounds of a run.

    Attributes:
        noise_multiplier: Standard deviation of the noise in units of the clipping norm; None if it
            follows from `epsilon`.
        epsilon: The privacy loss per unit over all rounds; None with a noise multiplier.
        delta: The delta of (epsilon, delta)-differential privacy.
        max_grad_norm: The norm that a unit's gradient is clipped to.
        unit: What is protected: `example`, or the name of a column.
        num_rounds: The number of rounds in the run, in each of which a client may have to train.
    """

    noise_multiplier: Positive | None
    epsilon: Positive | None
    delta: Annotated[float, Meta(gt=0, lt=1)]
    max_grad_norm: Positive
    unit: Label
    num_rounds: PositiveCount

    @classmethod
    def of(cls, dp: DPConfig, num_rounds: int) -> PrivateTerms:
        """Return the terms of a run's settings."""
        return cls(
            noise_multiplier=dp.noise_multiplier,
            epsilon=dp.epsilon,
            delta=dp.delta,
            max_grad_norm=dp.max_grad_norm,
            unit=dp.unit_column or EXAMPLE,
            num_rounds=num_rounds,
        )
