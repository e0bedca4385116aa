"""Which clients take part in a round, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from fedmomentum.errors import QuorumError
from fedmomentum.utils.seeding import derive_seed
from fedmomentum.utils.text import joined_reasons

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config

ROUNDING = 1e-9
"""Tolerance when rounding `fraction * n` up, so that floating-point error adds no client."""


def sample_clients(
    seed: int, server_round: int, client_ids: Sequence[str], client_fraction: float
) -> list[str]:
    """Sample `ceil(client_fraction * n)` clients, as seed and round determine; return them sorted.

    Args:
        seed: The run's seed.
        server_round: The round.
        client_ids: All clients.
        client_fraction: In (0, 1].
    """
    ordered = sorted(client_ids)
    count = sample_size(len(ordered), client_fraction)
    generator = torch.Generator().manual_seed(derive_seed(seed, "participants", server_round))
    permutation = torch.randperm(len(ordered), generator=generator).tolist()
    return sorted(ordered[index] for index in permutation[:count])


def sample_size(num_clients: int, client_fraction: float) -> int:
    """Return how many clients are sampled for a round."""
    return max(1, math.ceil(client_fraction * num_clients - ROUNDING))


def check_quorum(
    server_round: int,
    num_valid: int,
    num_asked: int,
    min_valid_fraction: float,
    failures: Mapping[str, str],
) -> None:
    """Refuse a round in which too few clients gave a usable update.

    Args:
        server_round: The round.
        num_valid: How many usable updates there are.
        num_asked: How many clients were asked.
        min_valid_fraction: The fraction of these that must be usable.
        failures: Client to why its update is missing.

    Raises:
        QuorumError: If there are too few; the message lists every reason.
    """
    needed = max(1, math.ceil(min_valid_fraction * num_asked - ROUNDING))
    if num_valid >= needed:
        return
    raise QuorumError(
        f"round {server_round}: {num_valid} of {num_asked} clients gave a usable update, and "
        f"at least {needed} must ({joined_reasons(failures)}). Rounds up to {server_round - 1} "
        "are saved; fix the clients and resume, or lower federation.min-valid-fraction"
    )


def evaluating_clients(
    config: Config,
    server_round: int,
    accepted: Sequence[str],
    connected: Sequence[str],
) -> Sequence[str]:
    """Return which clients evaluate: those that were accepted, and all others in the last round.

    Args:
        config: The run's settings.
        server_round: The round.
        accepted: The clients whose updates are used.
        connected: The clients that are connected now. They need no quorum: the round is complete,
            and must not be lost because clients left.
    """
    every = config.evaluation.every
    if every and server_round == config.federation.num_rounds:
        return sorted({*accepted, *connected})
    if every and server_round % every == 0:
        return accepted
    return []


def num_eval_examples(config: Config, server_round: int) -> int:
    """Return how many examples each client evaluates; round 0 and the last one may use more."""
    evaluation = config.evaluation
    if server_round in (0, config.federation.num_rounds):
        return max(evaluation.num_examples, evaluation.final_num_examples)
    return evaluation.num_examples
