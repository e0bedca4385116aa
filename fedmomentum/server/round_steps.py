"""`RoundSteps`: which optional steps a round has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmomentum.aggregation.update_filter import UpdateFilter
    from fedmomentum.server.secure_round import SecureRounds


@dataclass(frozen=True)
class RoundSteps:
    """The optional steps of a round.

    Screening and diagnostics look at single clients' updates; where these are summed under masks,
    there is neither.

    Attributes:
        screening: Leave out updates that are too large for the work that was asked for.
        diagnostics: Measure how each client moved.
        update_filter: Changes what comes of the sum before it becomes the model; the clients have
            their hook of the same filter.
        secure: Sums updates and scores up under masks; None where clients send them.
    """

    screening: bool = True
    diagnostics: bool = True
    update_filter: UpdateFilter | None = None
    secure: SecureRounds | None = None
