"""DP-SGD: what the optimizer sees is the noised, clipped sum, and nothing of it can be repeated."""

import math

import pytest
import torch

from fedmomentum.config.training import LocalTraining
from fedmomentum.errors import ConfigError
from fedmomentum.objectives.objective import CAUSAL_LM
from fedmomentum.privacy.mechanism import Mechanism, PrivateSettings
from fedmomentum.training.private_trainer import check_private_arguments
from fedmomentum.training.trainer import run_training, train
from tests.training.private_models import PAD, lora_model, random_rows
from tests.training.test_unit_gradients import UNITS, formula

NO_NOISE = 1e-12


def settings_of(*, noise=NO_NOISE, rate=1.0, steps=1, norm=0.5, batch=4.0, max_rows=4):
    return PrivateSettings(Mechanism(noise, rate, steps, norm, batch), UNITS, max_rows)


def changes(model, settings, *, lr=1.0, optim="sgd", seed=3, **options):
    """Train with plain SGD; return what each parameter changed by, and the report."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    hyperparameters = LocalTraining(lr, 4, local_steps=7, arguments={"optim": optim})
    report = train(
        model,
        random_rows(),
        hyperparameters,
        pad_token_id=PAD,
        seed=seed,
        private=settings,
        **options,
    )
    after = dict(model.named_parameters())
    return {n: (after[n].detach() - before[n]).double() for n in before}, report


def test_a_step_divides_the_clipped_sum_by_the_expected_batch():
    wanted, _ = formula(lora_model(), random_rows(), UNITS, 0.5, CAUSAL_LM)
    moved, report = changes(lora_model(), settings_of(batch=3.0))
    assert report.num_steps == 1  # those of the mechanism, not of the hyperparameters
    assert report.learning_rate_sum == 1.0
    for name, change in moved.items():
        torch.testing.assert_close(change, -wanted[name] / 3.0, atol=2e-6, rtol=1e-3)


def test_no_more_rows_than_allowed_go_through_the_model_together():
    model, sizes = lora_model(), []
    model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    moved, _ = changes(model, settings_of(max_rows=2))
    num_rows = sum(len(unit) for unit in UNITS)
    # Before the step, two made-up rows are compared with each of them alone.
    assert sizes[:3] == [2, 1, 1]
    assert max(sizes[3:]) == 2 and sum(sizes[3:]) == num_rows
    wanted, _ = changes(lora_model(), settings_of(max_rows=num_rows))
    for name, change in moved.items():
        torch.testing.assert_close(change, wanted[name], atol=2e-6, rtol=1e-3)


def test_empty_batch_still_gets_noise_of_the_right_size():
    settings = settings_of(noise=1.7, rate=1e-12, norm=0.25, batch=5.0)
    moved, report = changes(lora_model(), settings)
    assert report.num_tokens == 0 and math.isnan(report.loss)
    noise = torch.cat([change.flatten() for change in moved.values()])
    wanted = 1.7 * 0.25 / 5.0
    assert noise.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * len(noise)))
    assert abs(noise.mean().item()) < 5 * wanted / math.sqrt(len(noise))


@pytest.mark.parametrize("what", ["noise", "dropout", "sample"])
def test_no_seed_repeats_a_training(what):
    """The same seeds everywhere: noise, dropout and the units drawn still differ."""
    settings = {
        "noise": settings_of(noise=1.0, rate=1e-12),
        "dropout": settings_of(),
        "sample": settings_of(rate=0.5, steps=12),  # the same 12 samples of 4 units: 2^-48
    }[what]
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = lora_model(dropout=0.5 if what == "dropout" else 0.0)
        results.append(changes(model, settings)[0])
    first, second = results
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_penalty_is_added_without_noise_and_adam_works():
    model = lora_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]

    def penalty():
        return sum(parameter.square().sum() for parameter in parameters) / 2

    moved, _ = changes(model, settings_of(rate=1e-12), lr=0.1, penalty=penalty)
    for change, parameter in zip(moved.values(), start, strict=True):
        torch.testing.assert_close(change, -0.1 * parameter.double(), atol=1e-6, rtol=1e-4)
    moved, report = changes(lora_model(), settings_of(steps=2), optim="adamw_torch", moments={})
    assert all(change.any() for change in moved.values())
    assert set(report.moments) == set(moved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_checkpointing", True),
        ("gradient_accumulation_steps", 2),
        ("max_grad_norm", 1.0),
        ("train_sampling_strategy", "group_by_length"),
        ("dataloader_drop_last", True),
        ("optim", "lomo"),
        ("optim", "adafactor"),
    ],
)
def test_arguments_that_contradict_privacy_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        check_private_arguments({name: value})
    check_private_arguments({"weight_decay": 0.1, "optim": "sgd"})


def test_custom_training_function_is_refused():
    with pytest.raises(ConfigError, match="cannot be differentially private"):
        run_training(
            lambda *_, **__: None,
            lora_model(),
            random_rows(),
            LocalTraining(1.0, 4, local_steps=1),
            pad_token_id=PAD,
            seed=0,
            private=settings_of(),
        )


@pytest.mark.parametrize(
    "numbers", [(0, 0.5, 1, 1, 1), (1, 0, 1, 1, 1), (1, 1.1, 1, 1, 1), (1, 0.5, 0, 1, 1)]
)
def test_no_mechanism_without_noise_or_steps(numbers):
    with pytest.raises(ConfigError):
        Mechanism(*numbers)
