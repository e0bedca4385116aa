"""Optimizers and schedules are made once before a run, and nothing is left of it."""

import pytest
import torch

from fedmomentum.config.training import TrainingConfig
from fedmomentum.errors import ConfigError
from fedmomentum.training.optimizer import check_can_be_made

POLYNOMIAL = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 5e-4}}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 2},
            "warmup_steps": 100,
        },
        POLYNOMIAL,
    ],
)
def test_what_can_be_made_passes_and_draws_no_random_numbers(arguments):
    before = torch.get_rng_state()
    check_can_be_made(TrainingConfig(arguments=arguments), num_rounds=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_schedule_that_the_last_round_is_too_slow_for_is_refused_at_the_start():
    """The learning rate falls from 1e-3 to 1e-4, below the schedule's own end."""
    training = TrainingConfig(learning_rate_schedule="linear", arguments=POLYNOMIAL)
    check_can_be_made(training, num_rounds=1)
    with pytest.raises(ConfigError, match="schedule polynomial cannot be made: lr_end"):
        check_can_be_made(training, num_rounds=5)


def test_packages_of_clients_elsewhere_do_not_matter_to_a_server():
    missing = {"optim": "grokadamw"}
    check_can_be_made(TrainingConfig(arguments=missing), 1, schedule_only=True)
    plateau = TrainingConfig(arguments=missing | {"lr_scheduler_type": "reduce_lr_on_plateau"})
    with pytest.raises(ConfigError, match="reduce_lr_on_plateau follows evaluations"):
        check_can_be_made(plateau, 1, schedule_only=True)


def test_a_function_of_the_users_own_makes_its_own_optimizer():
    arguments = {"lr_scheduler_type": "reduce_lr_on_plateau"}
    check_can_be_made(TrainingConfig(function="mine:train", arguments=arguments), 1)
