"""`RoundSteps`: which optional steps a round runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmomentum.aggregation.update_filter import UpdateFilter
    from fedmomentum.server.secure_round import SecureRounds


@dataclass(frozen=True)
class RoundSteps:
    """The optional steps of a round.

    Screening and diagnostics look at single clients' updates, so masked sums rule out both.

    Attributes:
        screening: Leave out updates that are too large for the work that was requested.
        diagnostics: Measure how each client moved.
        update_filter: Changes the result of the sum before it becomes the model; the same filter
            also has a hook that runs on the clients.
        secure: Sums updates and scores under masks; None if clients send them openly.
    """

    screening: bool = True
    diagnostics: bool = True
    update_filter: UpdateFilter | None = None
    secure: SecureRounds | None = None
