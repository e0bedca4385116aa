"""Figures for a round's record on training and the sum: losses, energies, rounding, times."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from msgspec import UNSET, UnsetType

from fedmomentum.formats.round_record import EVALUATION_FAILED, ClientTraining, PhaseSeconds
from fedmomentum.linalg.matrix import Matrix, norm, rank_bound
from fedmomentum.protocol.messages import train_result

if TYPE_CHECKING:
    from fedmomentum.aggregation.aggregate import AggregationResult
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.protocol.messages import Reply
    from fedmomentum.server.replies import Replies


class PhaseTimer:
    """Adds up the wall time of a round's phases."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that a block takes to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self[name] + time.perf_counter() - started

    def __getitem__(self, name: str) -> float:
        """Return the seconds of a phase so far."""
        return self._seconds.get(name, 0.0)

    def total(self, training: Replies, evaluation: Replies) -> PhaseSeconds:
        """Return the times of a round: the server's phases and the two exchanges."""
        return PhaseSeconds(
            train=training.wait_seconds,
            encode=training.encode_seconds + evaluation.encode_seconds,
            aggregate=self["aggregate"],
            merge=self["merge"],
            evaluate=evaluation.wait_seconds,
            loading=training.loading_seconds + evaluation.loading_seconds,
        )


@dataclass(frozen=True)
class Energies:
    """A method's figures on the sum that it decomposed, over all modules; see docs/metrics.md.

    None for methods that report nothing, such as FedIT.
    """

    retained_energy: float | None = None
    residual_rank: float | None = None
    residual_norm: float | None = None
    carried_norm: float | None = None
    fallbacks: float | UnsetType = UNSET


def client_trainings(
    replies: Mapping[str, Reply], weights: Mapping[str, float], ranks: Mapping[str, int]
) -> dict[str, ClientTraining]:
    """Return what each accepted client reported of its training."""
    trainings = {}
    for client in weights:
        result = train_result(replies[client])
        trainings[client] = ClientTraining(
            loss=result.loss,
            first_loss=result.first_loss,
            last_loss=result.last_loss,
            num_steps=result.num_steps,
            num_tokens=result.num_tokens,
            rounding=result.rounding,
            rank=ranks[client],
        )
    return trainings


def mean_loss(
    trainings: Mapping[str, ClientTraining], weights: Mapping[str, float]
) -> float | None:
    """Return the clients' weighted mean loss; None if one of them withholds its own."""
    total = 0.0
    for client, weight in weights.items():
        loss = trainings[client].loss
        if loss is None:
            return None
        total += weight * loss
    return total


def uplink_rounding(replies: Mapping[str, Reply], weights: Mapping[str, float]) -> float:
    """Return the clients' weighted mean relative error from rounding their updates to 16 bits."""
    return sum(w * train_result(replies[client]).rounding for client, w in weights.items())


def energies(result: AggregationResult, model: GlobalModel) -> Energies:
    """Return the energies of a round's sum in effective weights.

    If a method does not report the sum's energy, it is that of what was kept plus that of what left
    the adapter in this round, since these parts are orthogonal.

    Args:
        result: The method's result.
        model: The resulting model.
    """
    scalings = model.adapter.scalings
    findings = {}
    for module, values in result.findings.items():
        if "kept_energy" in values:
            findings[module] = values
    residual = _squared_norms(result.residual)
    carried = _squared_norms(result.carried)
    kept_energy = 0.0
    energy = 0.0
    # Squared singular values are in adapter units; the scaling converts them to effective weights.
    for module, values in findings.items():
        kept = scalings[module] ** 2 * values["kept_energy"]
        kept_energy += kept
        if "energy" in values:
            energy += scalings[module] ** 2 * values["energy"]
        else:
            energy += kept + residual.get(module, 0.0) + carried.get(module, 0.0)
    if not energy:
        return Energies()

    fallbacks: float | UnsetType = UNSET
    if any("fallback" in values for values in result.findings.values()):
        fallbacks = sum(values["fallback"] for values in result.findings.values())
    residual_ranks = sum(rank_bound(part) for part in result.residual.values())
    return Energies(
        retained_energy=kept_energy / energy,
        residual_rank=residual_ranks / len(result.findings),
        residual_norm=math.sqrt(sum(residual.values()) / energy),
        carried_norm=math.sqrt(sum(carried.values()) / energy),
        fallbacks=fallbacks,
    )


def _squared_norms(parts: Mapping[str, Matrix]) -> dict[str, float]:
    return {module: norm(part, torch.float32) ** 2 for module, part in parts.items()}


def sum_by_client(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of two counts for each client in either of them."""
    clients = sorted({*one, *other})
    return {client: one.get(client, 0) + other.get(client, 0) for client in clients}


def joined_failures(training: Mapping[str, str], evaluation: Mapping[str, str]) -> dict[str, str]:
    """Return why each client's update, evaluation or both are missing."""
    failures = dict(training)
    for client, reason in evaluation.items():
        before = f"{failures[client]}; " if client in failures else ""
        failures[client] = f"{before}{EVALUATION_FAILED}{reason}"
    return dict(sorted(failures.items()))
