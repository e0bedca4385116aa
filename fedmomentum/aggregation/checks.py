"""Checks for updates that no method, or not this method, can aggregate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


# Weights are normalized in float64; a sum further from 1 means the caller forgot to normalize.
WEIGHT_SUM_TOLERANCE = 1e-6


def check_updates(updates: ClientUpdates, rank: int) -> None:
    """Reject updates that no method can aggregate.

    Args:
        updates: The clients' factors and weights.
        rank: The rank of the adapter to return.

    Raises:
        ValueError: If there are no updates, shapes differ, the weights are not one positive finite
            number per client that sum to 1, the rank is not in 1..min(out, in), or a factor
            contains NaN or Inf (the message names the client's position).
    """
    if not updates:
        raise ValueError("no updates to aggregate")
    if len(set(updates.shapes)) > 1:
        raise ValueError(f"the updates of one module must have one shape; got {updates.shapes}")
    _check_weights(updates.weights, len(updates))
    out_size, in_size = updates.shape
    if not 1 <= rank <= min(out_size, in_size):
        raise ValueError(
            f"rank must be from 1 to {min(out_size, in_size)} for a {out_size} x {in_size} matrix; "
            f"got {rank}"
        )
    _check_finite(updates)


def _check_weights(weights: Tensor, num_clients: int) -> None:
    """Reject weights that are not one positive number for each update, with sum 1."""
    if tuple(weights.shape) != (num_clients,):
        raise ValueError(
            f"one weight a client: got {num_clients} updates and weights of {tuple(weights.shape)}"
        )
    values = weights.tolist()
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"weights must be positive and finite; got {values}")
    total = sum(values)
    if abs(total - 1) > WEIGHT_SUM_TOLERANCE:
        raise ValueError(f"weights must sum to 1; they sum to {total!r}. Divide them by their sum")


def _check_finite(updates: ClientUpdates) -> None:
    """Reject updates that contain NaN or Inf."""
    # A sum propagates NaN and Inf, so sums check all elements fastest, with one device transfer.
    dtype = torch.promote_types(updates[0].dtype, torch.float32)
    sums = []
    for update in updates:
        sums += [update.B.sum(dtype=dtype), update.A.sum(dtype=dtype)]
    if bool(torch.isfinite(torch.stack(sums)).all()):
        return
    # A sum may also overflow, so reject only if an element itself is not finite.
    for position, update in enumerate(updates):
        for name in "BA":
            if not bool(torch.isfinite(_factor(update, name)).all()):
                raise ValueError(
                    f"update {position} holds NaN or Inf in its factor {name}; leave that client "
                    "out"
                )


def check_equal_ranks(title: str, updates: ClientUpdates, rank: int) -> None:
    """Reject factors of different ranks, which cannot be averaged.

    Raises:
        ValueError: If a client's rank is not `rank`.
    """
    if set(updates.ranks) != {rank}:
        raise ValueError(
            f"{title} averages factors and needs every client at rank {rank}; got ranks "
            f"{updates.ranks}. Use fedmomentum, which takes clients of any rank"
        )


def check_frozen_factor(title: str, updates: ClientUpdates, name: str) -> None:
    """Reject clients whose frozen factors are not identical bit for bit.

    Raises:
        ValueError: If a client's factor differs from the first client's; the message names its
            position.
    """
    expected = _factor(updates[0], name).to(CORE_DTYPE)
    for position, update in enumerate(updates):
        if not torch.equal(_factor(update, name).to(CORE_DTYPE), expected):
            raise ValueError(
                f"update {position} has another factor {name} than update 0; in this round of "
                f"{title} the factor {name} is frozen and the same for all clients. Use a method "
                "that trains both, such as fedmomentum"
            )


def _factor(update: LowRank, name: str) -> Tensor:
    return update.B if name == "B" else update.A
