"""AdamW that continues with one of its two moments, and starts the other from zero in every round.

AdamW corrects both moments for having started at zero, and counts the steps of both together. In
step k of a round, the moment that is carried over has t + k steps behind it, and the other one k.
The optimizer counts t + k, so its correction of the new moment is off by a known factor, and the
learning rate of the step is multiplied by that factor.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fedmomentum.aggregation.moments import Moments
from fedmomentum.training.optimizer_state import set_moments


def carry_first(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Moments]
) -> None:
    """Continue with the first moments only, as `set_moments` continues with both.

    The second moment is a sum of k squares, of which AdamW takes `v / (1 - beta2^(t+k))` for the
    mean instead of `v / (1 - beta2^k)`. Its root divides the step, so the learning rate is
    multiplied by the root of `(1 - beta2^k) / (1 - beta2^(t+k))`. AdamW's epsilon is multiplied
    along with it, which is of no consequence.
    """
    (_, beta2) = optimizer.param_groups[0]["betas"]
    carried = {}
    for name, value in moments.items():
        carried[name] = replace(value, second=torch.zeros_like(value.first))

    def factor(new_steps: int, all_steps: int) -> float:
        return math.sqrt((1 - beta2**new_steps) / (1 - beta2**all_steps))

    _start(optimizer, parameters, carried, factor)


def carry_second(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Moments]
) -> None:
    """Continue with the second moments only, as `set_moments` continues with both.

    AdamW divides the first moment by `1 - beta1^(t+k)` instead of `1 - beta1^k`, so the learning
    rate is multiplied by their ratio.
    """
    (beta1, _) = optimizer.param_groups[0]["betas"]
    carried = {}
    for name, value in moments.items():
        carried[name] = replace(value, first=torch.zeros_like(value.first))

    def factor(new_steps: int, all_steps: int) -> float:
        return float((1 - beta1**all_steps) / (1 - beta1**new_steps))

    _start(optimizer, parameters, carried, factor)


def _start(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    moments: Mapping[str, Moments],
    factor: Callable[[int, int], float],
) -> None:
    """Give an optimizer moments, and multiply the learning rate of each of its steps.

    Args:
        optimizer: The optimizer.
        parameters: The parameters that it trains, by name.
        moments: The moments, all of the same number of steps.
        factor: Returns the factor of a step, from the number of steps in this round and in all.
    """
    set_moments(optimizer, parameters, moments)
    steps_before = max((value.step for value in moments.values()), default=0)
    rates = [group["lr"] for group in optimizer.param_groups]
    new_steps = 0

    def scale(*_: Any) -> None:
        nonlocal new_steps
        new_steps += 1
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(new_steps, steps_before + new_steps)

    optimizer.register_step_pre_hook(scale)
