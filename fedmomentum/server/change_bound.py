"""How much one number of an adapter can change in a round: a public function of the job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmomentum.errors import ConfigError
from fedmomentum.lora.adapter import to_tensors
from fedmomentum.server.screening import StepRule
from fedmomentum.training.arguments import count_steps

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.lora.adapter import Adapter


ADAM_REACH = 3.2
"""Adam moves a number by at most (1 - b1) / sqrt(1 - b2) = 3.17 learning rates in a step, whatever
the gradients."""


def change_bound(config: Config, hyperparameters: LocalTraining, start: Adapter) -> float:
    """Return a bound of the change of a number of the adapter in a round, for every client.

    Args:
        config: The run's settings.
        hyperparameters: The round's.
        start: The adapter that the clients start from.

    Raises:
        ConfigError: If nothing is known of the optimizer's steps, and the settings give no bound.
    """
    if config.privacy.max_change is not None:
        return config.privacy.max_change
    rule = check_change_bound(config, hyperparameters.learning_rate)
    # The bound holds for the client with most examples; schedules only lower the learning rate.
    num_steps = count_steps(config.privacy.max_examples, hyperparameters)
    rates = num_steps * hyperparameters.learning_rate
    length = rule.per_number if rule.per_number is not None else rule.per_step
    assert length is not None
    moved = ADAM_REACH * length * rates
    # Decay takes from a number in proportion to its size: that at the start, and the change.
    largest = max(float(tensor.abs().max()) for tensor in to_tensors(start).values())
    return moved + rates * rule.weight_decay * (largest + moved)


def check_change_bound(config: Config, learning_rate: float) -> StepRule:
    """Return what is known of the steps of the run's optimizer.

    Raises:
        ConfigError: If that is nothing.
    """
    training = config.training
    rule = StepRule.of(
        learning_rate, training.arguments, own_function=training.function is not None
    )
    if not rule.is_known:
        what = "training.function" if training.function is not None else "the optimizer"
        raise ConfigError(
            f"nothing is known of how far {what} moves a number of the adapter, and a secure sum "
            "needs a bound; set privacy.max-change"
        )
    return rule
