"""AdamW that continues with one of its two moments, and makes the other anew every round.

AdamW corrects both moments for having started at zero by one count of steps. Here the moment that is
carried over is t + k steps old in step k of a round, and the other one k steps old. So the optimizer
keeps the count t + k, and the learning rate of step k makes up for what that gets wrong about the
new moment.
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
    set_moments(optimizer, parameters, carried)
    _scale_steps(
        optimizer,
        _num_steps(moments),
        lambda new, all_steps: math.sqrt((1 - beta2**new) / (1 - beta2**all_steps)),
    )


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
    set_moments(optimizer, parameters, carried)
    _scale_steps(
        optimizer,
        _num_steps(moments),
        lambda new, all_steps: (1 - beta1**all_steps) / (1 - beta1**new),
    )


def _num_steps(moments: Mapping[str, Moments]) -> int:
    """Return the number of steps behind the moments, which all parameters have made together."""
    return max((value.step for value in moments.values()), default=0)


def _scale_steps(
    optimizer: Optimizer, num_before: int, factor: Callable[[int, int], float]
) -> None:
    """Multiply the learning rate of each step by a factor of the steps in this round and of all."""
    rates = [group["lr"] for group in optimizer.param_groups]
    num_new = 0

    def scale(*_: Any) -> None:
        nonlocal num_new
        num_new += 1
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(num_new, num_before + num_new)

    optimizer.register_step_pre_hook(scale)
