"""Bounds on how far an optimizer moves parameters, whatever the gradient.

This module answers two questions. How long is a step, roughly, when many parameters move at once?
The server's screening uses this to compare clients. And how far can a single element move in a
round, at most? This is the public bound for secure sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmomentum.training.arguments import DEFAULT_OPTIMIZER, TrainingFields, optimizer_options

if TYPE_CHECKING:
    from fedmomentum.aggregation.moments import Moments
    from fedmomentum.config.schema import Config
    from fedmomentum.config.training import LocalTraining

ROUNDING = 1.01
"""Margin for the float32 round-off that accumulates over many steps."""
BETAS = (0.9, 0.999)
"""Adam's betas, unless configured."""
RMSPROP_ALPHA = 0.99
MAX_GRAD_NORM = TrainingFields().max_grad_norm
"""The norm to which gradients are clipped, unless configured."""
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
"""AdamW variants with full-precision moments; with rounded moments no bound holds exactly."""
TINY = 1e-300
NEGLIGIBLE = 1e-16
"""A power this small no longer changes a float64 number."""


@dataclass(frozen=True)
class StepSize:
    """How long a step of the run's optimizer can be.

    Attributes:
        learning_rate: The learning rate of the round.
        per_element: How far one element typically moves in a step, in units of the learning rate;
            None if unknown. Of Adam's steps, `adam_displacement` is the bound.
        max_norm: The most that all elements together change in a step (Euclidean norm), in units
            of the learning rate; None if unknown.
        weight_decay: Weight decay, in units of the learning rate.
    """

    learning_rate: float
    per_element: float | None
    max_norm: float | None = None
    weight_decay: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything is known about how far a step goes."""
        return self.per_element is not None or self.max_norm is not None

    @classmethod
    def of(cls, config: Config, learning_rate: float) -> StepSize:
        """Return the step size of the optimizer of a run.

        A step of Adam moves each element by about one learning rate, whatever the gradient. Plain
        gradient descent is bounded by the norm to which the gradient is clipped. Nothing is known
        about a user-defined training function.

        Args:
            config: The run's settings.
            learning_rate: The learning rate of the round.
        """
        arguments = config.training.arguments
        name = str(arguments.get("optim", DEFAULT_OPTIMIZER))
        decay = float(arguments.get("weight_decay", 0.0))
        if config.training.function is not None:
            return cls(learning_rate, None)
        if name == "sgd":
            return cls(learning_rate, None, clipping_norm(config), decay)
        if name.startswith("adamw_torch") or name in ("adafactor", "adagrad"):
            return cls(learning_rate, 1.0, None, decay)
        if name == "rmsprop":  # its first step divides by a tenth of the gradient
            return cls(learning_rate, 10.0, None, decay)
        return cls(learning_rate, None)


def clipping_norm(config: Config) -> float | None:
    """Return an upper bound on the gradient norm of any optimizer step; None if there is none.

    A user-defined training function may not clip. Private training clips each unit's gradient, but
    adds unbounded noise to the sum.

    Args:
        config: The run's settings.
    """
    if config.training.function is not None or config.privacy.dp is not None:
        return None
    norm = float(config.training.arguments.get("max_grad_norm", MAX_GRAD_NORM))
    return norm if norm > 0 else None


# ── the most that one number can change in a round ──


@dataclass(frozen=True)
class _Displacement:
    """How far an element can move over all steps of a round.

    Attributes:
        gradients: Movement by gradients, in units of the learning rate.
        decay: Movement by weight decay, in units of learning rate times decay times magnitude.
    """

    gradients: float
    decay: float


def max_element_change(
    training: LocalTraining,
    num_steps: int,
    *,
    max_magnitude: float,
    largest_tensor: int,
    steps_before: int = 0,
    carried: float = 0.0,
) -> float | None:
    """Return a bound on how much one trained element changes in a round, whatever the data.

    It holds for our own trainer, and for schedules that never exceed the round's learning rate, as
    all of transformers' do by default.

    Args:
        training: The round's hyperparameters.
        num_steps: The maximum number of steps per client.
        max_magnitude: The largest magnitude of an element before the round.
        largest_tensor: The number of elements of the largest trained tensor.
        steps_before: The number of earlier steps that the optimizer's moments may cover.
        carried: How far the initial moments alone can move an element, in units of the learning
            rate (`moments_displacement`).

    Returns:
        The bound; None if nothing is known about the optimizer.
    """
    displacement = _displacement(training.arguments, num_steps, steps_before, largest_tensor)
    if displacement is None or not math.isfinite(displacement.gradients):
        return None
    # In every step, decay pulls an element, of at most this magnitude, toward zero.
    moved = training.learning_rate * (displacement.gradients + carried)
    weight_decay = float(training.arguments.get("weight_decay", 0.0))
    decayed = training.learning_rate * weight_decay * displacement.decay * (max_magnitude + moved)
    return ROUNDING * (moved + decayed)


def moments_displacement(
    arguments: Mapping[str, Any], num_steps: int, moments: Iterable[Moments]
) -> float:
    """Return how far moments alone can move an element in a round, in units of the learning rate.

    Moments that were averaged and transformed to other factors do not stem from actual gradients,
    so the only bound on them is their own values. In Adam's step k after t earlier ones, the
    initial moments move an element by at most `beta1^k |m| / (1 - beta1^(t + k))` over
    `sqrt(beta2^k v / (1 - beta2^(t + k))) + epsilon`; new gradients only make v larger.

    Args:
        arguments: The run's training arguments; the optimizer is AdamW, or SGD with momentum.
        num_steps: The maximum number of steps per client.
        moments: The moments that the round starts with.
    """
    options = optimizer_options(arguments)
    beta1 = float(arguments.get("adam_beta1", BETAS[0]))
    beta2 = float(arguments.get("adam_beta2", BETAS[1]))
    epsilon = float(arguments.get("adam_epsilon", TrainingFields().adam_epsilon))
    largest = 0.0
    for moment in moments:
        first = moment.first.double().abs()
        displacement = 0.0
        if moment.second is None:
            momentum = float(options.get("momentum", "0"))
            for step in range(1, num_steps + 1):
                displacement += momentum**step * float(first.max())
        else:
            # Epsilon's effect grows with the number of steps; use the smallest, to stay a bound.
            root = moment.second.double().sqrt() + epsilon * math.sqrt(
                1 - beta2 ** (moment.step + 1)
            )
            ratio = float((first / root.clamp(min=TINY)).max())
            for step in range(1, num_steps + 1):
                old = moment.step + step
                decay = (beta1 / math.sqrt(beta2)) ** step
                displacement += decay * ratio * math.sqrt(1 - beta2**old) / (1 - beta1**old)
        largest = max(largest, displacement)
    return largest


def _displacement(
    arguments: Mapping[str, Any], num_steps: int, steps_before: int, largest_tensor: int
) -> _Displacement | None:
    """Return how far an element can move; None if unknown."""
    # Each optimizer needs its own argument; nothing is claimed about those not listed.
    name = str(arguments.get("optim", DEFAULT_OPTIMIZER))
    options = optimizer_options(arguments)
    if name in ADAMW:
        beta1 = float(arguments.get("adam_beta1", BETAS[0]))
        beta2 = float(arguments.get("adam_beta2", BETAS[1]))
        return _Displacement(adam_displacement(beta1, beta2, num_steps, steps_before), num_steps)
    if name == "sgd":
        return _sgd_displacement(arguments, options, num_steps, steps_before)
    # For the other optimizers, any option would change the bound.
    if options:
        return None
    # These two add decay to the gradient, whose magnitude does not matter.
    if name == "adagrad":
        return _Displacement(num_steps, 0)
    if name == "rmsprop":
        return _Displacement(num_steps / math.sqrt(1 - RMSPROP_ALPHA), 0)
    if name == "adafactor":
        # A step is clipped to a root mean square of 1, but may be concentrated in one element.
        return _Displacement(num_steps * math.sqrt(largest_tensor), num_steps)
    return None


def _sgd_displacement(
    arguments: Mapping[str, Any], options: Mapping[str, str], num_steps: int, steps_before: int
) -> _Displacement | None:
    """Return how far SGD can move an element, if the gradient's norm is clipped."""
    clip = float(arguments.get("max_grad_norm", MAX_GRAD_NORM))
    if clip <= 0 or not options.keys() <= {"momentum", "nesterov"}:
        return None
    try:
        momentum = float(options.get("momentum", "0"))
    except ValueError:
        return None
    # At 1 and above, old gradients never decay.
    if not 0 <= momentum < 1:
        return None
    # A gradient acts in its own step, and less in each following one, so step t can move as far as
    # (1 - m^t) / (1 - m) first steps; this is the sum. Here, decay is part of the gradient, added
    # after clipping.
    missing = momentum ** (steps_before + 1) * (1 - momentum**num_steps) / (1 - momentum)
    steps = (num_steps - missing) / (1 - momentum)
    return _Displacement(steps * clip, steps)


def adam_displacement(beta1: float, beta2: float, num_steps: int, steps_before: int = 0) -> float:
    """Return how far Adam can move an element over all steps, in units of the learning rate.

    Step t moves an element by `m / (1 - beta1^t)` over `sqrt(v / (1 - beta2^t))`, where m and v are
    the running averages of its gradients and their squares. By the Cauchy-Schwarz inequality,
    `m^2 <= v (1 - beta1)^2 / (1 - beta2) * sum_{k < t} (beta1^2 / beta2)^k`. With the usual betas,
    a step is at most 1 at first, 1.2 in step 20, and never more than 7.3.

    Args:
        beta1: The decay of m, below 1.
        beta2: The decay of v, below 1.
        num_steps: The number of steps.
        steps_before: How many earlier steps m and v may cover.
    """
    if beta2 == 0:
        # v is the last gradient's square, but m may contain a much larger earlier gradient.
        return math.inf if beta1 else float(num_steps)
    ratio = beta1**2 / beta2
    if ratio >= 1:  # relative to v, old gradients never fade from m
        return math.inf
    # Update the powers of both decays and of their ratio step by step.
    power1 = 1.0
    power2 = 1.0
    power_of_ratio = 1.0
    series = 0.0
    largest = 0.0
    displacement = 0.0
    for step in range(1, steps_before + num_steps + 1):
        power1 *= beta1
        power2 *= beta2
        series += power_of_ratio
        power_of_ratio *= ratio
        square = (1 - beta1) ** 2 / (1 - beta2) * series * (1 - power2)
        # Use the largest so far, because m and v may cover fewer steps than the maximum.
        largest = max(largest, math.sqrt(square) / (1 - power1))
        if step > steps_before:
            displacement += largest
        if max(power1, power2, power_of_ratio) < NEGLIGIBLE:
            # The bound no longer changes in the remaining steps.
            left = steps_before + num_steps - step
            return displacement + largest * min(left, num_steps)
    return displacement
