"""Aggregation of Llama-3.1-8B adapters on a device, against the CPU and the published SVD."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from aggregation_speed import even, ours, published
from common import Target, alternate, medians
from gpu_models import Budget, free_memory, synchronize

from fedmomentum import Adapter, AggregationContext, ClientUpdates, FedMomentum, LowRank
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.linalg.truncated_svd.dispatch import truncated_svd

CLIENTS = 10
LAYERS = 32
SHAPES = {  # (out, in), and how many such modules a layer has
    "q, o": ((4096, 4096), 2),
    "k, v": ((1024, 4096), 2),
    "gate, up": ((14336, 4096), 2),
    "down": ((4096, 14336), 1),
}
INPUTS = ("common start", "apart")
PUBLISHED_SECONDS = 10.0
"""About so many seconds go into repeats of the published aggregation, of all shapes at one rank."""


def draw(
    kind: str, shape: tuple[int, int], rank: int, device: torch.device, seed: int = 0
) -> list[LowRank]:
    """Draw the clients' updates of one module on the device.

    Args:
        kind: `apart`, updates with nothing in common; or `common start`, clients that moved a tenth
            from one adapter.
        shape: The module's `(out, in)`.
        rank: Of every client.
        device: Where they are.
        seed: Of the numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def one() -> LowRank:
        B = torch.randn(shape[0], rank, generator=generator, device=device) / shape[0] ** 0.5
        A = torch.randn(rank, shape[1], generator=generator, device=device) / shape[1] ** 0.5
        return LowRank(B, A)

    if kind == "apart":
        return [one() for _ in range(CLIENTS)]
    start = one()
    moves = [one() for _ in range(CLIENTS)]
    return [LowRank(start.B + 0.1 * move.B, start.A + 0.1 * move.A) for move in moves]


def error_of(updates: Sequence[LowRank], rank: int) -> float:
    """Return `||sum - adapter - residual|| / ||sum||`, of dense matrices in float64."""
    result = FedMomentum().aggregate(
        ClientUpdates(updates, even(len(updates))), AggregationContext(rank=rank)
    )
    total = torch.zeros(updates[0].shape, dtype=torch.float64, device=updates[0].device)
    for update in updates:
        total.addmm_(update.B.double(), update.A.double(), alpha=1 / len(updates))
    norm = float(total.norm())
    assert result.residual is not None
    for part in (result.adapter, result.residual):
        total -= to_dense(part.to(torch.float64))
    return float(total.norm()) / norm


def ranks(*, tiny: bool) -> tuple[int, int]:
    """Return the ranks to measure."""
    return (2, 4) if tiny else (16, 64)


def measure_aggregation(
    rank: int, device: torch.device, budget: Budget, *, tiny: bool, repeats: int = 5
) -> tuple[dict[str, Any], list[Target]]:
    """Time one module of each shape on every side, and a full round on the device if time allows.

    A round's time on the CPU and of the published way is that of one module of each shape times how
    many there are.
    """
    rows: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    dense: dict[str, dict[str, Any]] = {}
    for kind in INPUTS:
        own_rows = []
        for name, (shape, count) in _shapes(tiny).items():
            updates = draw(kind, shape, rank, device)
            if name not in dense:
                dense[name] = _time_published(updates, device)
            facts = {"module": name, "shape": shape, "count": count, "rank": rank, "input": kind}
            row = _compare(updates, rank, device, 2 if tiny else repeats)
            own_rows.append({**facts, **row, **dense[name]})
        summary = _round_of(own_rows, rank, kind)
        # making the adapters takes some time as well
        if 2 * summary["device"] + 15 < budget.left():
            summary["whole"] = time_whole_round(kind, rank, device, tiny=tiny)
        rows += own_rows
        rounds.append(summary)
        free_memory(device)
    return {"modules": rows, "rounds": rounds}, _targets_of(rows, rounds)


def _targets_of(rows: Sequence[dict[str, Any]], rounds: Sequence[dict[str, Any]]) -> list[Target]:
    worst = max(row["error"] for row in rows)
    name = f"8B, rank {rounds[0]['rank']}: error of adapter + residual, any module"
    targets = [Target.at_most(name, 1e-6, worst)]
    for row in rounds:
        what = f"8B, rank {row['rank']}, {row['input']}"
        of_published, of_cpu = (row[side] / row["device"] for side in ("published", "cpu"))
        targets.append(
            Target.at_least(f"{what}: speed against the published way, times", 20, of_published)
        )
        targets.append(
            Target.at_least(f"{what}: speed of the device against its CPU, times", 1, of_cpu)
        )
    return targets


def _shapes(tiny: bool) -> dict[str, tuple[tuple[int, int], int]]:
    if not tiny:
        return SHAPES
    return {
        name: ((shape[0] // 32, shape[1] // 32), count) for name, (shape, count) in SHAPES.items()
    }


def _compare(
    updates: Sequence[LowRank], rank: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Time our aggregation on device and CPU in turn; path and error are those on the device."""
    on_cpu = [LowRank(update.B.cpu(), update.A.cpu()) for update in updates]
    sides: dict[str, Callable[[], Any]] = {
        "device": partial(ours, updates, rank),
        "cpu": partial(ours, on_cpu, rank),
    }
    path = truncated_svd(updates, even(len(updates)), rank, dtype=torch.float32).path
    return {"path": path, "error": error_of(updates, rank), **medians(alternate(sides, repeats))}


def _time_published(updates: Sequence[LowRank], device: torch.device) -> dict[str, Any]:
    """Time the published aggregation on the device, as many runs as the time allows."""
    synchronize(device)
    first = alternate({"": partial(published, updates)}, 1, warmups=0)[""][0]
    repeats = max(1, min(3, int(PUBLISHED_SECONDS / len(SHAPES) / max(first, 1e-6))))
    seconds = medians(alternate({"": partial(published, updates)}, repeats, warmups=0))[""]
    return {"published": seconds, "published_runs": repeats}


def _round_of(rows: Sequence[dict[str, Any]], rank: int, kind: str) -> dict[str, Any]:
    """Add up a whole round from one module of each shape."""
    sums = {
        side: LAYERS * sum(row["count"] * row[side] for row in rows)
        for side in ("device", "cpu", "published")
    }
    return {"rank": rank, "input": kind, **sums}


def time_whole_round(kind: str, rank: int, device: torch.device, *, tiny: bool) -> float:
    """Return the seconds of one aggregation of all modules, with the adapters on the device."""
    layers = 2 if tiny else LAYERS
    modules: list[dict[str, LowRank]] = [{} for _ in range(CLIENTS)]
    for layer in range(layers):
        for name, (shape, count) in _shapes(tiny).items():
            for index in range(count):
                seed = layer * 100 + index
                for client, update in zip(
                    modules, draw(kind, shape, rank, device, seed), strict=True
                ):
                    client[f"{layer}.{name}.{index}"] = update
    scalings = dict.fromkeys(modules[0], 2.0)
    adapters = [
        Adapter(factors, scalings, name=f"client {index}") for index, factors in enumerate(modules)
    ]
    ranks = dict.fromkeys(modules[0], rank)
    synchronize(device)
    started = time.perf_counter()
    result = aggregate_updates(
        adapters, [1.0] * CLIENTS, FedMomentum(), RoundContext(ranks=ranks, scalings=scalings)
    )
    synchronize(device)
    seconds = time.perf_counter() - started
    assert len(result.adapter.modules) == layers * sum(count for _, count in SHAPES.values())
    return seconds
