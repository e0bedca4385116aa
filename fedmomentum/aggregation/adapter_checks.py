"""Checks of whole adapters that are combined outside of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedmomentum.errors import AdapterError
from fedmomentum.lora.peft_layout import stacks

if TYPE_CHECKING:
    from fedmomentum.lora.adapter import Adapter


def check_offline_weights(weights: Sequence[float], num_adapters: int) -> None:
    """Reject weights that are not one positive number for each adapter, with a finite sum.

    Raises:
        AdapterError: If their number differs, one is not positive, or their sum is not finite.
    """
    if len(weights) != num_adapters:
        raise AdapterError(
            f"one weight per adapter: got {num_adapters} adapters and {len(weights)} weights"
        )
    total = sum(weights)
    is_positive = all(0 < weight < math.inf for weight in weights)
    # The sum may overflow, and the smallest weight may underflow when divided by it.
    if not is_positive or not 0 < min(weights) / total < math.inf:
        raise AdapterError(f"weights must be positive numbers with a finite sum; got {weights}")


def check_same_experts(adapters: Sequence[Adapter]) -> None:
    """Reject adapters that have different numbers of experts in the same parameter.

    Raises:
        AdapterError: If they have; the message names two of them.
    """
    first_owner: dict[str, tuple[int, str]] = {}
    for adapter in adapters:
        for parameter, experts in stacks(adapter.modules, adapter.name).items():
            number, owner = first_owner.setdefault(parameter, (len(experts), adapter.name))
            if number != len(experts):
                raise AdapterError(
                    f"{parameter} has {number} experts in {owner} and {len(experts)} in "
                    f"{adapter.name}; the adapters are of different models"
                )
