"""What the plan says of a client's memory on a device, beside what the client took."""

from __future__ import annotations

import math
from typing import Any

from common import Target
from gpu_models import Size

from fedmomentum.config.schema import Config
from fedmomentum.run.memory import (
    BaseSizes,
    ServerBytes,
    choose_placement,
    estimate,
    simulate_steps,
)
from fedmomentum.run.outline import outline_model

TOLERANCE = 0.15


def planned_memory(config: Config, size: Size) -> dict[str, int]:
    """Return the bytes that the plan gives the device, before anything has been merged."""
    outline = outline_model(config, (), is_plan=True)
    place = choose_placement(config, outline)
    # As the benchmark's rows are: the loss is taken on the last three quarters.
    longest = (size.length, size.length - size.length // 4)
    trained = outline.adapter.num_parameters()
    host, device = estimate(
        config,
        BaseSizes.of(outline.base, outline.adapter, outline.saved),
        place,
        simulate_steps(config, outline, place, longest),
        ServerBytes(adapter=0, update=0, aggregating=0),
        trained,
    )
    use = device or host
    return {"rest": use.at_rest, "loading": use.loading, "training": use.training}


def plan_targets(name: str, planned: dict[str, int], measured: dict[str, Any]) -> list[Target]:
    """Return how far the plan is from what was measured; nothing where nothing was."""
    targets = []
    for when, wanted in planned.items():
        error = abs(measured[when] / wanted - 1)
        if math.isfinite(error):
            title = f"{name}: the plan's memory of a client, {when}, relative error"
            targets.append(Target.at_most(title, TOLERANCE, error))
    return targets
