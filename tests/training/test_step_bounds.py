"""The bound of a change holds against the worst gradients, and is not far from what they reach."""

import math

import pytest
import torch

from fedmomentum.aggregation.moments import Moments
from fedmomentum.config.training import LocalTraining
from fedmomentum.training.step_bounds import (
    adam_displacement,
    max_element_change,
    moments_displacement,
)


def training(learning_rate=0.1, **arguments):
    return LocalTraining(
        learning_rate=learning_rate, batch_size=4, local_steps=1, arguments=arguments
    )


def optimizer_of(parameter, hyperparameters):
    """As transformers makes it."""
    arguments = hyperparameters.arguments
    options = {"lr": hyperparameters.learning_rate}
    options["weight_decay"] = arguments.get("weight_decay", 0.0)
    name = arguments.get("optim", "adamw_torch")
    if name == "sgd":
        if "optim_args" in arguments:
            options["momentum"] = float(arguments["optim_args"].partition("=")[2])
        return torch.optim.SGD([parameter], **options)
    if name == "adagrad":
        return torch.optim.Adagrad([parameter], **options)
    if name == "rmsprop":
        return torch.optim.RMSprop([parameter], **options)
    betas = (arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999))
    return torch.optim.AdamW([parameter], betas=betas, eps=1e-300, **options)


def schedules(num_steps):
    """Gradients that take optimizers far: constant, growing, late, random in sign and size."""
    draw = torch.Generator().manual_seed(0)
    yield [1.0] * num_steps
    yield [1.2**step for step in range(num_steps)]
    yield [(0.999 / 0.9) ** step for step in range(num_steps)]
    yield [0.0] * (num_steps - 1) + [1.0]
    yield [1e-6] * (num_steps // 2) + [1e6] * (num_steps - num_steps // 2)
    yield (torch.randn(num_steps, generator=draw, dtype=torch.float64).exp() ** 3).tolist()
    yield torch.randn(num_steps, generator=draw, dtype=torch.float64).tolist()


def moved(hyperparameters, gradients, start=0.7, *, keep_last=None):
    parameter = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = optimizer_of(parameter, hyperparameters)
    clip = hyperparameters.arguments.get("max_grad_norm", 1.0)
    positions = [start]
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([parameter], clip)
        if "sgd" not in hyperparameters.arguments.get("optim", ""):
            parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        positions.append(float(parameter.detach()))
    origin = positions[-1 - keep_last] if keep_last else start
    return abs(positions[-1] - origin)


@pytest.mark.parametrize("num_steps", [1, 7, 60])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"adam_beta1": 0.5, "adam_beta2": 0.9},
        {"adam_beta1": 0.0, "adam_beta2": 0.99},
        {"weight_decay": 0.05},
        {"optim": "sgd"},
        {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.01},
        {"optim": "adagrad", "weight_decay": 0.3},
        {"optim": "rmsprop"},
    ],
)
def test_no_gradients_move_a_value_beyond_the_bound(num_steps, arguments):
    hyperparameters = training(**arguments)
    bound = max_element_change(
        hyperparameters, num_steps, max_magnitude=0.7, largest_tensor=1, steps_before=0
    )
    reached = []
    for gradients in schedules(num_steps):
        for sign in (1, -1):
            reached.append(moved(hyperparameters, [sign * g for g in gradients]))
    # not a bound of anything: the worst of these few comes within a fourth of it
    assert bound / 4 < max(reached) <= bound


def test_moments_of_earlier_rounds_move_a_value_further():
    hyperparameters = training()
    bound = max_element_change(
        hyperparameters, 5, max_magnitude=10.0, largest_tensor=1, steps_before=1000
    )
    fresh = max_element_change(hyperparameters, 5, max_magnitude=10.0, largest_tensor=1)
    growing = [(0.999 / 0.9) ** max(0, step - 965) for step in range(1005)]
    reached = moved(hyperparameters, growing, keep_last=5)
    assert 3 * fresh < reached <= bound


def test_adafactor_can_put_its_entire_step_into_one_value():
    one = max_element_change(training(optim="adafactor"), 3, max_magnitude=1.0, largest_tensor=100)
    assert one == pytest.approx(1.01 * 0.1 * 3 * 10)


def test_the_reach_of_many_steps_is_that_of_adding_them_up():
    """The shortcut for steps in which nothing changes any more gives what the loop gives."""
    for before in (0, 500):
        few = [adam_displacement(0.5, 0.9, n, before) for n in (400, 500, 600)]
        assert few[2] - few[1] == pytest.approx(few[1] - few[0], rel=1e-12)
    assert adam_displacement(0.9, 0.999, 1) == 1.0
    assert adam_displacement(0.9, 0.999, 1, 10**6) == pytest.approx(7.27, abs=0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "lion_32bit"},
        {"optim": "adamw_torch_8bit"},
        {"optim": "sgd", "max_grad_norm": 0},
        {"optim": "sgd", "optim_args": "momentum=1.5"},
        {"optim": "sgd", "optim_args": "dampening=-3"},
        {"optim": "rmsprop", "optim_args": "alpha=0.999999"},
        {"adam_beta1": 0.99, "adam_beta2": 0.9},
        {"adam_beta2": 0.0},
    ],
)
def test_of_some_optimizers_no_bound_is_known(arguments):
    assert max_element_change(training(**arguments), 5, max_magnitude=1, largest_tensor=1) is None
    assert math.isinf(adam_displacement(0.9, 0.0, 5))


@pytest.mark.parametrize("step", [1, 20, 3000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9)])
def test_no_initial_moments_move_a_value_beyond_the_bound(step, betas):
    """Whatever they are: those of no gradients, too, as means over clients in other coordinates are."""
    draw = torch.Generator().manual_seed(step)
    first = torch.randn(4, 3, generator=draw).exp() * torch.randn(4, 3, generator=draw)
    second = 1e-4 * torch.randn(4, 3, generator=draw).exp() ** 4
    second[0] = 0.0
    given = Moments(1e-3 * first, second, step)
    hyperparameters = training(adam_beta1=betas[0], adam_beta2=betas[1], weight_decay=0.1)
    arguments = hyperparameters.arguments
    for num_steps in (1, 7, 30):
        carried = moments_displacement(arguments, num_steps, [given])
        bound = max_element_change(
            hyperparameters,
            num_steps,
            max_magnitude=0.7,
            largest_tensor=12,
            steps_before=step,
            carried=carried,
        )
        largest = 0.0
        for sign in (0.0, 1.0, -1.0):
            for gradients in (
                [1e-9] * num_steps,
                [1.0] * num_steps,
                [1e3**-k for k in range(num_steps)],
            ):
                parameter = torch.nn.Parameter(torch.full((4, 3), 0.7))
                optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=betas, weight_decay=0.1)
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": given.first.clone(),
                    "exp_avg_sq": given.second.clone(),
                }
                for gradient in gradients:
                    parameter.grad = sign * gradient * given.first.sign()
                    optimizer.step()
                largest = max(largest, float((parameter.detach() - 0.7).abs().max()))
        assert largest <= bound
        # It is a bound of what they do, not of anything.
        assert bound < 6 * largest or step == 1


def test_a_momentum_buffer_of_sgd_counts_once_and_decays():
    given = Moments(torch.tensor([[0.5, -2.0]]), None, 3)
    arguments = {"optim": "sgd", "optim_args": "momentum=0.5"}
    assert moments_displacement(arguments, 3, [given]) == pytest.approx(2.0 * (0.5 + 0.25 + 0.125))
    assert moments_displacement(arguments, 3, []) == 0.0
