"""AdamW that continues with one moment makes the steps of its formula."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedmomentum.aggregation.moments import Moments
from fedmomentum.training.optimizer_state import read_moments

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
BETA1, BETA2, RATE = 0.9, 0.999, 0.03


@pytest.fixture
def one_moment(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS / "banking77"), *sys.path])
    return importlib.import_module("one_moment")


@pytest.mark.parametrize("carried", ["first", "second"])
@pytest.mark.parametrize("num_before", [0, 1, 24])
def test_the_moment_that_is_not_carried_starts_from_zero(one_moment, carried, num_before):
    torch.manual_seed(0)
    start = torch.randn(5, 3, dtype=torch.float64)
    gradients = torch.randn(4, 5, 3, dtype=torch.float64)
    old = Moments(torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.1, max(num_before, 1))
    moments = {"A": old} if num_before else {}

    parameter = nn.Parameter(start.clone())
    # Without an epsilon, which is scaled along with the learning rate.
    optimizer = torch.optim.AdamW([parameter], lr=RATE, weight_decay=0.0, eps=0.0)
    start_optimizer = getattr(one_moment, f"carry_{carried}")
    start_optimizer(optimizer, {"A": parameter}, moments)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()

    first = torch.zeros_like(start)
    second = torch.zeros_like(start)
    first_steps = second_steps = 0
    if num_before and carried == "first":
        first, first_steps = old.first.clone(), num_before
    if num_before and carried == "second":
        second, second_steps = old.second.clone(), num_before
    expected = start.clone()
    for gradient in gradients:
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        first_steps += 1
        second_steps += 1
        root = (second / (1 - BETA2**second_steps)).sqrt()
        expected -= RATE * first / (1 - BETA1**first_steps) / root
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(expected, start, atol=1e-2)

    after = read_moments(optimizer, {"A": parameter})["A"]
    assert after.step == num_before + len(gradients)
    kept = after.first if carried == "first" else after.second
    wanted = first if carried == "first" else second
    torch.testing.assert_close(kept.double(), wanted, rtol=1e-6, atol=1e-6)
