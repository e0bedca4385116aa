"""A client whose base has merged parts beside its weights: memory and speed against plain PEFT."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import Target, alternate
from gpu_models import synchronize, watch_memory

from fedmomentum import LowRank
from fedmomentum.client.local_model import LocalModel
from fedmomentum.linalg.matrix import Matrix

FACTORS = "factors"
INT8 = "8 bits"
PART_RANK = 64
"""The rank of one merged part: four clients of rank 16 with nothing in common."""
WANTED_MEMORY = {FACTORS: 1.15, INT8: 1.6}
"""The most that a client may take while it trains, times what plain PEFT takes."""


@dataclass(frozen=True, eq=False)
class Part:
    """A `MergedPart` whose factors are on the device.

    Attributes:
        name: Stands for the hash of its bytes.
        matrices: Module to its factors.
    """

    name: str
    matrices: Mapping[str, Matrix]


def merged_parts(local: LocalModel) -> Iterator[tuple[str, list[Part]]]:
    """Yield how D is held, and parts that have it held so: one part, or enough of them for 8 bits.

    The parts of the second kind share the memory of the first one's factors.
    """
    base = local.base_weights
    device = next(local.peft.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    matrices: dict[str, Matrix] = {}
    most_parts = 1
    for module in base.layers:
        out_size, in_size = base.shape(module)
        B = torch.randn(out_size, PART_RANK, generator=generator, device=device) * 1e-5
        A = torch.randn(PART_RANK, in_size, generator=generator, device=device)
        matrices[module] = LowRank(B, A)
        # As factors a part takes two bytes a number, in 8 bits the sum takes one a weight.
        one_part = 2 * PART_RANK * (out_size + in_size)
        most_parts = max(most_parts, -(-out_size * in_size // one_part))
    yield FACTORS, [Part("0", matrices)]
    yield INT8, [Part(str(index), matrices) for index in range(most_parts)]


def measure_merged(
    plain: Callable[[], None],
    client: Callable[[], None],
    local: LocalModel,
    rest: Mapping[str, float],
    repeats: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Measure a client's training with D as factors and with D in 8 bits.

    Args:
        plain: Trains plain PEFT in a plain loop.
        client: Trains the client's model as often.
        local: The client's model; nothing is merged into it afterwards.
        rest: The client's bytes, as `_load_and_train` has them.
        repeats: Trainings of each side, in turn.
        device: Where both are.
    """
    rows = []
    for held, parts in merged_parts(local):
        with watch_memory(device) as merging:
            local.base_weights.apply(parts)
        num_parts = len(parts)
        del parts
        with watch_memory(device) as training:
            client()
        at_rest = rest["rest"] + merging.after
        synchronize(device)
        seconds = alternate({"plain": plain, "client": client}, repeats)
        ratios = [
            one / other for one, other in zip(seconds["plain"], seconds["client"], strict=True)
        ]
        rows.append(
            {
                "held": held,
                "rank": num_parts * PART_RANK,
                "rest": at_rest,
                "training": at_rest + training.peak,
                "seconds": seconds,
                "ratio": statistics.median(ratios),
            }
        )
    local.base_weights.reset()
    return rows


def merged_targets(
    name: str, rows: list[dict[str, Any]], plain: Mapping[str, float]
) -> list[Target]:
    """Return what is wanted of memory where it was measured; speed has no target here."""
    targets = []
    for row in rows:
        times = row["training"] / plain["training"]
        if times == times:
            title = f"{name}: memory of a client, training, D in {row['held']}, times plain PEFT's"
            targets.append(Target.at_most(title, WANTED_MEMORY[row["held"]], times))
    return targets
