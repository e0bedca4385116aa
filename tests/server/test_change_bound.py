"""The public bound of a round's changes follows from the settings and holds for real training."""

import pytest
import torch

from fedmomentum.config.toml import from_dict
from fedmomentum.errors import ConfigError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
from fedmomentum.server.change_bound import change_bound


def adapter():
    draw = torch.Generator().manual_seed(1)
    matrix = LowRank(torch.zeros(6, 2), torch.randn(2, 5, generator=draw))
    return Adapter({"q": matrix}, {"q": 3.0}, {"head": torch.ones(4, 2)}, {}, "start")


def bound(server_round=1, *, privacy=None, federation=None, **training):
    tables = {"privacy": privacy or {}, "federation": federation or {}, "training": training}
    return change_bound(from_dict(tables), server_round, adapter())


def test_it_grows_with_learning_rate_and_steps_unless_the_job_sets_it():
    one = bound(**{"learning-rate": 1e-3, "local-steps": 1})
    assert one == pytest.approx(1.01e-3)
    assert bound(**{"learning-rate": 2e-3, "local-steps": 1}) == pytest.approx(2 * one)
    assert 20 * one < bound(**{"learning-rate": 1e-3, "local-steps": 20}) < 25 * one
    assert bound(privacy={"max-change": 0.25}) == 0.25


def test_with_epochs_it_covers_the_largest_client():
    many = bound(privacy={"max-examples": 800}, **{"local-epochs": 1, "batch-size": 8})
    assert many == bound(**{"local-steps": 100, "batch-size": 8})


def test_it_follows_the_schedule_over_the_rounds_and_knows_of_kept_moments():
    training = {"local-steps": 5, "learning-rate-schedule": "linear"}
    federation = {"num-rounds": 11}
    first, last = (bound(k, federation=federation, **training) for k in (1, 11))
    assert last == pytest.approx(first / 10)
    kept = bound(11, federation=federation, **training, **{"optimizer-state": "local"})
    assert kept > last


def test_decay_counts_the_largest_number_of_all_that_is_trained():
    decayed = {"local-steps": 1, "arguments": {"weight_decay": 0.5}}
    largest = max(float(adapter().modules["q"].A.abs().max()), 1.0)
    wanted = 1.01 * (1e-3 + 0.5e-3 * (largest + 1e-3))
    assert bound(**decayed) == pytest.approx(wanted)


def test_without_a_known_step_length_the_bound_must_be_given():
    with pytest.raises(ConfigError, match="own:train can change .* set privacy.max-change"):
        bound(function="own:train")
