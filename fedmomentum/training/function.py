"""The contract of a training function of the user's own, `[training] function = "module:name"`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict, Unpack

from torch import Tensor, nn

from fedmomentum.errors import ConfigError

if TYPE_CHECKING:
    from fedmomentum.data.tokenization import TokenizedExamples


OnStep = Callable[[int, int, float], None]
"""Called after every training step with (step from 1, number of steps, loss)."""
Penalty = Callable[[], Tensor]
"""Returns a term that is added to the loss of every step, computed on the live weights."""


@dataclass(frozen=True)
class TrainReport:
    """The result of one local training.

    Attributes:
        loss: Mean loss of a completion token over all steps, in nats.
        first_loss: Mean loss over the first step only, before any change of the weights.
        last_loss: Mean loss over the last step.
        num_steps: Number of optimizer steps.
        num_tokens: Number of completion tokens trained on, repetitions included.
    """

    loss: float
    first_loss: float
    last_loss: float
    num_steps: int
    num_tokens: int


class TrainingKeywords(TypedDict):
    """The keywords of a training function.

    Attributes:
        pad_token_id: Fills short rows; any valid id, for it is masked.
        learning_rate: Learning rate of the optimizer.
        local_steps: Number of optimizer steps; None where `local_epochs` is given.
        local_epochs: Number of passes over the examples; None where `local_steps` is given.
        batch_size: Examples in a batch.
        arguments: The table [training.arguments].
        seed: Seed of everything random in the training.
        on_step: Called after each step with (step from 1, number of steps, loss).
        penalty: Added to the loss of every step; there only where the method has a penalty.
    """

    pad_token_id: int
    learning_rate: float
    local_steps: int | None
    local_epochs: float | None
    batch_size: int
    arguments: Mapping[str, Any]
    seed: int
    on_step: OnStep
    penalty: NotRequired[Penalty]


class TrainingFunction(Protocol):
    """A training function of the user's own.

    It trains the model's parameters that have `requires_grad`, in place.
    """

    def __call__(
        self,
        model: nn.Module,
        examples: TokenizedExamples,
        /,
        **keywords: Unpack[TrainingKeywords],
    ) -> TrainReport:
        """Train the model on the examples."""


def check_report(report: Any, function: TrainingFunction) -> TrainReport:
    """Return what a training function of the user's own returned, if it is usable.

    Raises:
        ConfigError: If it is no `TrainReport`, or one with a loss that is not finite.
    """
    if not isinstance(report, TrainReport):
        raise ConfigError(
            f"the training function {function!r} returned {type(report).__name__}; wanted a "
            "fedmomentum.training.TrainReport"
        )
    for name in ("loss", "first_loss", "last_loss"):
        value = getattr(report, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(
                f"the training function {function!r} reported {name} = {value!r}; wanted a finite "
                "number"
            )
    return report
