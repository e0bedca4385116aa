"""The clients' weights in a sum: fractions of a total, none above a cap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Client = TypeVar("Client", str, int)
ROUNDING = 1e-12
"""How far above the cap a weight may be, relative to it, because of rounding."""


def capped_weights(sizes: Mapping[Client, float], max_weight: float) -> dict[Client, float]:
    """Return `w_i = N_i / sum N`, capped; the excess goes to the other clients in proportion.

    Args:
        sizes: Client to its positive size, such as its number of training examples.
        max_weight: The largest weight of a client. A cap below equal weights is impossible, and
            gives equal weights.

    Returns:
        The weights, sorted by client; they sum to 1.
    """
    cap = max(max_weight, 1 / len(sizes))
    capped: set[Client] = set()
    while True:
        # Distribute what the capped clients leave among the others, until none exceeds the cap.
        uncapped = sum(size for client, size in sizes.items() if client not in capped)
        free_weight = 1 - cap * len(capped)
        weights = {}
        for client, size in sorted(sizes.items()):
            weights[client] = cap if client in capped else free_weight * size / uncapped
        above = {client for client, weight in weights.items() if weight > cap * (1 + ROUNDING)}
        if not above:
            return weights
        capped |= above
