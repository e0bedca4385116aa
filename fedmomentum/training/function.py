"""The interface of user-defined training functions, `[training] function = "module:name"`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict, Unpack

from torch import Tensor, nn

from fedmomentum.aggregation.moments import Moments
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.training.optimizer_state import check_moments

if TYPE_CHECKING:
    from fedmomentum.data.tokenized import TokenizedExamples
    from fedmomentum.objectives.objective import Objective
    from fedmomentum.privacy.mechanism import PrivateSettings


OnStep = Callable[[int, int, float], None]
"""Called after every training step with (step from 1, number of steps, loss)."""
Penalty = Callable[[], Tensor]
"""Returns a term that is added to the loss of every step, computed on the live weights."""


@dataclass(frozen=True)
class TrainReport:
    """The result of one local training.

    Attributes:
        loss: Mean loss per target over all steps, in nats. A target is a completion token, or a
            pair of answers.
        first_loss: Mean loss over the first step only, before any weight changes.
        last_loss: Mean loss over the last step.
        num_steps: Number of optimizer steps.
        num_tokens: Number of targets trained on, including repetitions.
        moments: The optimizer's moments after the last step, by the names of `named_parameters`;
            None if not requested.
        learning_rate_sum: Sum of the learning rates of all steps; in the report of a user-defined
            function, None means a constant learning rate.
    """

    loss: float
    first_loss: float
    last_loss: float
    num_steps: int
    num_tokens: int
    moments: Mapping[str, Moments] | None = field(default=None, repr=False)
    learning_rate_sum: float | None = None


class TrainingSettings(TypedDict):
    """Settings of a training besides the model, the examples and the hyperparameters.

    Attributes:
        pad_token_id: Pads short rows; any valid id, since padding is masked.
        seed: Seed for everything random in the training.
        on_step: Called after each step with (step from 1, number of steps, loss).
        penalty: Added to the loss of every step; None if the method has none.
        moments: The moments that the optimizer starts from, by the names of `named_parameters`;
            parameters without moments start fresh. With None, unlike an empty mapping, no moments
            are reported afterward.
        objective: What to minimize; the loss of the completions by default.
        private: Settings of differentially private training; None for plain training.
    """

    pad_token_id: int
    seed: int
    on_step: NotRequired[OnStep | None]
    penalty: NotRequired[Penalty | None]
    moments: NotRequired[Mapping[str, Moments] | None]
    objective: NotRequired[Objective]
    private: NotRequired[PrivateSettings | None]


class TrainingKeywords(TypedDict):
    """The keyword arguments of a training function.

    Attributes:
        pad_token_id: Pads short rows; any valid id, since padding is masked.
        learning_rate: Learning rate of the optimizer.
        local_steps: Number of optimizer steps; None if `local_epochs` is given.
        local_epochs: Number of passes over the examples; None if `local_steps` is given.
        batch_size: Examples per batch.
        arguments: The table [training.arguments].
        seed: Seed for everything random in the training.
        on_step: Called after each step with (step from 1, number of steps, loss).
        penalty: Added to the loss of every step; passed only if the method has a penalty.
        moments: The moments that the optimizer starts from, by the names of `named_parameters`;
            passed only if the report must contain the moments after training.
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
    moments: NotRequired[Mapping[str, Moments]]


class TrainingFunction(Protocol):
    """A user-defined training function.

    It trains the model's parameters with `requires_grad` in place.
    """

    def __call__(
        self,
        model: nn.Module,
        examples: TokenizedExamples,
        /,
        **keywords: Unpack[TrainingKeywords],
    ) -> TrainReport:
        """Train the model on the examples."""


def check_report(
    report: Any,
    function: TrainingFunction,
    *,
    learning_rate: float,
    parameters: Mapping[str, nn.Parameter] | None,
) -> TrainReport:
    """Check what a user-defined training function returned.

    Args:
        report: What it returned.
        function: The function, for messages.
        learning_rate: The learning rate of the round.
        parameters: The trained parameters by name; None if moments are not requested.

    Returns:
        The report, with the sum of the learning rates, and with moments only if requested.

    Raises:
        ConfigError: If it is not a `TrainReport`, a number in it is invalid, or requested moments
            are missing or unusable.
    """
    if not isinstance(report, TrainReport):
        raise ConfigError(
            f"the training function {function!r} returned {type(report).__name__}; wanted a "
            "fedmomentum.training.TrainReport"
        )
    result: TrainReport = report
    counts = {}
    for name in ("num_steps", "num_tokens"):
        number = _whole_number(getattr(result, name))
        if number is None or number < 0:
            raise ConfigError(
                f"the training function {function!r} reported {name} = "
                f"{getattr(result, name)!r}; wanted a whole number, at least 0"
            )
        counts[name] = number
    result = replace(result, num_steps=counts["num_steps"], num_tokens=counts["num_tokens"])
    if result.learning_rate_sum is None:
        result = replace(result, learning_rate_sum=learning_rate * result.num_steps)
    for name in ("loss", "first_loss", "last_loss", "learning_rate_sum"):
        value = getattr(result, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(
                f"the training function {function!r} reported {name} = {value!r}; wanted a finite "
                "number"
            )
    if parameters is None:
        return replace(result, moments=None)
    _check_reported_moments(result.moments, function, parameters)
    return result


def _whole_number(value: Any) -> int | None:
    """Return a whole number of any library, such as NumPy's, as an int; None for other values."""
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # such as a tensor of several numbers
        return None


def _check_reported_moments(
    moments: Any, function: TrainingFunction, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Reject moments that do not belong to the trained parameters.

    Raises:
        ConfigError: If there are none, or `check_moments` rejects them.
    """
    if not isinstance(moments, Mapping) or not moments:
        raise ConfigError(
            f"the training function {function!r} reported no moments by parameter name; wanted "
            "those of its optimizer: return TrainReport(..., moments=read_moments(optimizer, "
            "trained_parameters(model))), with both functions from "
            'fedmomentum.training.optimizer_state, or set training.optimizer-state = "fresh"'
        )
    try:
        check_moments(moments, parameters)
    except ModelError as error:
        raise ConfigError(
            f"the training function {function!r} reported moments that cannot be used: {error}"
        ) from error
