"""An optimizer's moments of LoRA factors: their mean over clients, carried through aggregation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """What an optimizer remembers of one parameter.

    Attributes:
        first: The running mean of the gradient, in the parameter's shape: Adam's `exp_avg`, SGD's
            `momentum_buffer`.
        second: The running mean of its square, Adam's `exp_avg_sq`; None for SGD.
        step: The number of optimizer steps behind them.
    """

    first: Tensor
    second: Tensor | None
    step: int
