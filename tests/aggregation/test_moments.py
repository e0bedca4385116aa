"""An optimizer's moments through averaging and changes of coordinates, proved from the formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.aggregation import FedMomentum
from fedmomentum.aggregation.moments import (
    Moments,
    OptimizerSettings,
    SecondMomentMeans,
    carry_moments,
    gauge_rotation,
    limit_first_moment,
    mean_moments,
    reconstruct_moments,
)
from fedmomentum.linalg.low_rank import LowRank
from tests.helpers import aggregate, error, generator, random_matrix, some_weights

OUT, IN, RANK = 20, 15, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rotation(seed, size=RANK):
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def gradients(factors: LowRank, G: torch.Tensor, scaling: float) -> dict[str, torch.Tensor]:
    """The gradients of the factors where the effective weight `scaling B A` has gradient G."""
    B = factors.B.clone().requires_grad_()
    A = factors.A.clone().requires_grad_()
    (scaling * (B @ A) * G).sum().backward()
    return {"B": B.grad, "A": A.grad}


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_carried_first_moments_are_the_gradients_of_the_new_factors(scale):
    """Exact for a rotation and a change of scale, by autograd."""
    before = random_matrix(OUT, IN, RANK)
    turn = rotation(1)
    after = LowRank(before.B @ turn.mT / scale, scale * turn @ before.A)
    G = draw(OUT, IN, seed=2)
    measured = {
        kind: Moments(gradient, gradient.square(), 5)
        for kind, gradient in gradients(before, G, 1.7).items()
    }
    carried = carry_moments(measured, before, after)
    for kind, gradient in gradients(after, G, 1.7).items():
        assert error(carried[kind].first, gradient) < 1e-10
        assert carried[kind].step == 5


def test_carried_second_moments_are_those_of_uncorrelated_rows():
    """The mean square over many gradients whose rows are independent, each of its own size."""
    before = random_matrix(OUT, IN, RANK)
    turn = rotation(3)
    after = LowRank(before.B @ turn.mT, turn @ before.A)
    sizes = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)[:, None]
    samples = sizes * draw(20_000, RANK, IN, seed=4)
    second = {"A": Moments(samples[0], samples.square().mean(dim=0), 1)}
    carried = carry_moments(second, before, after)["A"].second
    wanted = (turn @ samples).square().mean(dim=0)
    assert error(carried, wanted) < 0.05
    assert error(second["A"].second, wanted) > 0.5


def test_equal_factors_leave_moments_as_they_are():
    factors = random_matrix(OUT, IN, RANK)
    moments = {"A": Moments(draw(RANK, IN), draw(RANK, IN, seed=1).square(), 2)}
    carried = carry_moments(moments, factors, LowRank(factors.B.clone(), factors.A.clone()))
    assert carried["A"] is moments["A"]


def test_a_round_trip_is_the_identity_for_first_moments():
    before = random_matrix(OUT, IN, RANK)
    turn = rotation(5)
    after = LowRank(before.B @ turn.mT * 0.5, 2 * turn @ before.A)
    moments = {"B": Moments(draw(OUT, RANK), None, 1), "A": Moments(draw(RANK, IN), None, 1)}
    there = carry_moments(moments, before, after)
    back = carry_moments(there, after, before)
    for kind, moment in moments.items():
        assert error(back[kind].first, moment.first) < 1e-10
        assert back[kind].second is None


def test_the_procrustes_split_needs_no_rotation():
    start = random_matrix(OUT, IN, RANK)
    updates = [
        LowRank(start.B + 0.1 * draw(OUT, RANK, seed=i), start.A + 0.1 * draw(RANK, IN, seed=9 + i))
        for i in range(3)
    ]
    weights = some_weights(3)
    mean = LowRank(
        sum(float(w) * u.B for w, u in zip(weights, updates, strict=True)),
        sum(float(w) * u.A for w, u in zip(weights, updates, strict=True)),
    )
    adapter = aggregate(FedMomentum(split="procrustes"), updates, weights, rank=RANK).adapter
    assert error(gauge_rotation(mean, adapter), torch.eye(RANK, dtype=torch.float64)) < 1e-10
    balanced = aggregate(FedMomentum(split="balanced"), updates, weights, rank=RANK).adapter
    assert error(gauge_rotation(mean, balanced), torch.eye(RANK, dtype=torch.float64)) > 0.1


# ── reconstruction ──


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 20),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 2**31),
)
def test_a_constant_gradient_is_reconstructed(num_steps, first_step, weight_decay, seed):
    """With a constant gradient, AdamW's moments follow from how far it moved: to round-off."""
    rows = draw(4, 1, seed=seed).abs() + 0.1
    columns = draw(1, 5, seed=seed + 1).abs() + 0.1
    signs = torch.sign(draw(4, 5, seed=seed + 2))
    gradient = signs * (rows * columns)  # its square is of rank one
    parameter = torch.nn.Parameter(draw(4, 5, seed=seed + 3))
    lr = 1e-6
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=weight_decay)
    for _ in range(first_step):
        parameter.grad = gradient.clone()
        optimizer.step()
    start = parameter.detach().clone()
    for _ in range(num_steps):
        parameter.grad = gradient.clone()
        optimizer.step()
    state = optimizer.state[parameter]
    displacement = (parameter.detach() - start) / (lr * num_steps)
    second = SecondMomentMeans.of(state["exp_avg_sq"]).expand()
    assert error(second, state["exp_avg_sq"]) < 1e-10
    got = reconstruct_moments(
        displacement,
        start,
        second,
        first_step + num_steps,
        OptimizerSettings(weight_decay=weight_decay),
    )
    assert error(got.first, state["exp_avg"]) < 1e-4  # a step of 1e-6 rounds the displacement
    assert got.step == first_step + num_steps


def test_a_false_sum_of_learning_rates_moves_nothing_further_than_adam_can():
    settings_of_run = OptimizerSettings()
    assert settings_of_run.max_movement == pytest.approx(7.27, abs=0.01)
    second = draw(4, 5).square() + 0.1
    honest = draw(4, 5, seed=1).clamp(-1, 1)
    start = 0 * honest
    false = reconstruct_moments(1e6 * honest, start, second, 100_000, settings_of_run)
    got = limit_first_moment(false, start, None, settings_of_run)
    step = got.first / second.sqrt()  # the bias corrections are 1 by then
    assert float(step.abs().max()) == pytest.approx(settings_of_run.max_movement, rel=1e-6)
    true = reconstruct_moments(honest, start, second, 100_000, settings_of_run)
    unclamped = limit_first_moment(true, start, None, settings_of_run)
    assert error(unclamped.first / second.sqrt(), -honest) < 1e-6


@settings(deadline=None)
@given(st.floats(0.0, 0.95), st.floats(0.9, 0.9999), st.integers(1, 2000), st.integers(0, 2**31))
def test_no_gradients_move_adam_further_than_its_bound(beta1, beta2, num_steps, seed):
    """The gradients that make the Cauchy-Schwarz inequality an equality, and random ones."""
    if beta1**2 / beta2 > 0.98:
        return
    bound = OptimizerSettings(beta1=beta1, beta2=beta2).max_movement
    ages = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64)
    for gradients in ((beta1 / beta2) ** ages, draw(num_steps, seed=seed).exp()):
        first = (1 - beta1) * (beta1**ages * gradients).sum() / (1 - beta1**num_steps)
        second = (1 - beta2) * (beta2**ages * gradients**2).sum() / (1 - beta2**num_steps)
        assert float(first / second.sqrt()) <= bound * (1 + 1e-9)


def test_adams_bound_is_reached_in_the_long_run():
    """By the gradients that make the inequality an equality; AdamW itself takes the steps."""
    beta1, beta2, num_steps = 0.9, 0.999, 8000
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(beta1, beta2), eps=0, weight_decay=0)
    for age in range(num_steps - 1, -1, -1):
        before = parameter.detach().clone()
        parameter.grad = torch.tensor([max((beta1 / beta2) ** age, 1e-140)], dtype=torch.float64)
        optimizer.step()
    last_step = float((parameter.detach() - before).abs())
    assert last_step == pytest.approx(OptimizerSettings(beta1, beta2).max_movement, rel=1e-3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_the_buffer_of_sgd_is_minus_the_displacement(weight_decay):
    parameter = torch.nn.Parameter(draw(4, 5))
    optimizer = torch.optim.SGD([parameter], lr=0.5, momentum=0.9, weight_decay=weight_decay)
    start = parameter.detach().clone()
    parameter.grad = draw(4, 5, seed=1)
    optimizer.step()
    displacement = (parameter.detach() - start) / 0.5
    sgd = OptimizerSettings(weight_decay=weight_decay)
    got = reconstruct_moments(displacement, start, None, 1, sgd)
    assert error(got.first, optimizer.state[parameter]["momentum_buffer"]) < 1e-12
    assert got.second is None


def test_a_false_first_moment_moves_nothing_further_than_adam_can():
    adam = OptimizerSettings()
    second = draw(4, 5).square() + 0.1
    honest = Moments(draw(4, 5, seed=1).clamp(-1, 1) * second.sqrt(), second, 100_000)
    assert torch.equal(limit_first_moment(honest, second, None, adam).first, honest.first)
    false = Moments(1e6 * honest.first, second, 100_000)
    step = limit_first_moment(false, second, None, adam).first / second.sqrt()
    assert float(step.abs().max()) == pytest.approx(adam.max_movement, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.9])
@pytest.mark.parametrize("size_before", [0.0, 100.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_buffer_of_sgd_is_limited_to_what_clipped_gradients_add_up_to(
    momentum, size_before, weight_decay
):
    """Torch's own steps stay within the limit; anything larger is cut down to it."""
    start, before, gradient = draw(3, 4), size_before * draw(3, 4), draw(3, 4, seed=1)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], 1e-9, momentum, weight_decay=weight_decay)
    optimizer.state[parameter] = {"momentum_buffer": before.clone()}
    for _ in range(20):
        parameter.grad = 2.0 * gradient / gradient.norm()
        optimizer.step()
    buffer = optimizer.state[parameter]["momentum_buffer"]
    sgd = OptimizerSettings(weight_decay=weight_decay, momentum=momentum, gradient_norm=2.0)
    kept = limit_first_moment(Moments(buffer, None, 20), start, before, sgd)
    assert error(kept.first, buffer) < 1e-12
    false = limit_first_moment(Moments(1e9 * buffer, None, 20), start, before, sgd)
    largest = (2.0 + weight_decay * float(start.norm())) / (1 - momentum)
    assert float(false.first.norm()) == pytest.approx(max(largest, float(before.norm())))


def test_the_buffer_of_sgd_has_no_limit_without_clipping():
    huge = Moments(1e9 * draw(3, 4), None, 2)
    for open_end in (OptimizerSettings(), OptimizerSettings(momentum=1.0, gradient_norm=1.0)):
        assert limit_first_moment(huge, draw(3, 4), None, open_end) is huge


def test_means_keep_the_sums_and_add_up_over_clients():
    second = draw(4, 5).square()
    means = SecondMomentMeans.of(second)
    expanded = means.expand()
    assert torch.allclose(expanded.mean(dim=1), second.mean(dim=1), rtol=1e-12)
    assert torch.allclose(expanded.mean(dim=0), second.mean(dim=0), rtol=1e-12)
    zero = SecondMomentMeans.of(torch.zeros(4, 5)).expand()
    assert not zero.any() and zero.shape == (4, 5)


def test_means_are_weighted_and_steps_rounded():
    moments = [
        Moments(draw(2, 3, seed=i), draw(2, 3, seed=9 + i).square(), step)
        for i, step in enumerate((3, 8))
    ]
    mean = mean_moments(moments, [0.25, 0.75])
    assert error(mean.first, 0.25 * moments[0].first + 0.75 * moments[1].first) < 1e-12
    assert error(mean.second, 0.25 * moments[0].second + 0.75 * moments[1].second) < 1e-12
    assert mean.step == round(0.25 * 3 + 0.75 * 8) and math.isfinite(mean.step)
