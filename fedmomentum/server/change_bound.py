"""The public bound on a round's changes, which fixes the range of its secure sums.

It follows from the run's settings and the shared starting adapter, so that server and clients can
both compute it, and reveals nothing about any client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedmomentum.errors import ConfigError
from fedmomentum.protocol.secure_messages import MomentTerms
from fedmomentum.server.screening import requested_steps
from fedmomentum.training.step_bounds import ROUNDING, max_element_change, moments_displacement

if TYPE_CHECKING:
    from fedmomentum.aggregation.moments import Moments
    from fedmomentum.config.schema import Config
    from fedmomentum.lora.adapter import Adapter


def change_bound(
    config: Config, server_round: int, start: Adapter, moments: Sequence[Moments] = ()
) -> float:
    """Return a bound on how much one number of a client's adapter can change in a round.

    It is `privacy.max-change` if given, else the furthest that the optimizer can move a number in
    the steps of a client with `privacy.max-examples` examples.

    Args:
        config: The run's settings.
        server_round: The round.
        start: What all clients start from.
        moments: What their optimizers start from, if they share it.

    Raises:
        ConfigError: If neither is known.
    """
    privacy = config.privacy
    if privacy.max_change is not None:
        return privacy.max_change
    # The steps of the largest client: with epochs, they depend on its number of examples.
    training = config.training
    hyperparameters = training.hyperparameters(server_round, config.federation.num_rounds)
    num_steps = requested_steps(privacy.max_examples, hyperparameters)
    # All trained tensors, in the units in which they are trained.
    factors = [factor for matrix in start.modules.values() for factor in (matrix.B, matrix.A)]
    tensors = [*factors, *start.saved.values()]
    # A client's own moments may go back to the start of the run; shared ones are known.
    steps_before = max((moment.step for moment in moments), default=0)
    if training.optimizer_state == "local":
        steps_before = (server_round - 1) * num_steps
    bound = None
    if training.function is None:
        bound = max_element_change(
            hyperparameters,
            num_steps,
            max_magnitude=max(float(tensor.abs().max()) for tensor in tensors),
            largest_tensor=max(tensor.numel() for tensor in tensors),
            steps_before=steps_before,
            carried=moments_displacement(training.arguments, num_steps, moments),
        )
    if bound is None:
        raise ConfigError(unknown_change(config))
    return bound


def moment_terms(config: Config, server_round: int, second_total: float) -> MomentTerms:
    """Return the limits on the optimizer figures that a client reports after a round.

    Args:
        config: The run's settings.
        server_round: The round.
        second_total: The largest possible sum of all second moments.
    """
    training = config.training
    hyperparameters = training.hyperparameters(server_round, config.federation.num_rounds)
    num_steps = requested_steps(config.privacy.max_examples, hyperparameters)
    rate_sum = ROUNDING * num_steps * hyperparameters.learning_rate
    return MomentTerms(second_total=second_total, learning_rate_sum=rate_sum)


def unknown_change(config: Config) -> str:
    """Return the error message if no bound on the training's changes is known."""
    training = config.training
    if training.function is not None:
        what = f"training.function, {training.function}"
    else:
        settings = ("optim", "optim_args", "max_grad_norm", "adam_beta1", "adam_beta2")
        given = [
            f"{key} = {training.arguments[key]!r}" for key in settings if key in training.arguments
        ]
        what = f"the optimizer with {', '.join(given)}"
    return (
        f"nothing is known of how far {what} can change a number of the adapter in a round, and "
        "secure sums count within a public bound; set privacy.max-change"
    )
