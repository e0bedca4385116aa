"""How many steps a client makes, and what of transformers' arguments can be set: right, or refused by name."""

import math
import re
from fractions import Fraction

import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from fedmomentum.config.training import LocalTraining
from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import tokenize
from fedmomentum.errors import ConfigError, DataError
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.compare import plan_runs
from fedmomentum.run.method_variants import parse_methods
from fedmomentum.training.arguments import (
    TrainingFields,
    check_arguments,
    count_steps,
    count_warmup_steps,
)
from fedmomentum.training.optimizer import trainer_arguments_from
from fedmomentum.training.unused_arguments import refuse_unused_arguments
from tests.runs import prepare, start, timeless, tiny_config
from tests.tiny import tiny_llama
from tests.training.keywords import train
from tests.training.test_trainer import DEFAULTS, adapter_of, new_model, rows, same_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def tokens_of(folder, count):
    examples = [Example("ab"[: 1 + i % 2] + str(i * 7), "xyz"[: 1 + i % 3]) for i in range(count)]
    return tokenize(
        examples,
        AutoTokenizer.from_pretrained(folder),
        max_length=32,
        max_truncated_fraction=0.0,
        owner="test",
    )


# ── steps ──


@given(
    st.integers(1, 10_000),
    st.integers(1, 64),
    st.integers(1, 9),
    st.booleans(),
    st.one_of(st.fractions(0, 5, max_denominator=100).filter(bool), st.just(Fraction(1, 10**9))),
)
def test_epochs_are_rounded_up_to_whole_steps_in_exact_arithmetic(
    num_examples, batch_size, accumulated, drops, epochs
):
    arguments = {"gradient_accumulation_steps": accumulated, "dataloader_drop_last": drops}
    settings = {
        "local_epochs": float(epochs),
        "batch_size": batch_size,
        "arguments": arguments,
    }
    settings = LocalTraining(learning_rate=1.0, **settings)
    num_batches = num_examples // batch_size if drops else -(-num_examples // batch_size)
    if not num_batches:
        with pytest.raises(DataError, match="nothing is left to train on"):
            count_steps(num_examples, settings)
        return
    wanted = math.ceil(epochs * -(-num_batches // accumulated))
    assert count_steps(num_examples, settings) == max(1, wanted)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize(
    ("batch_size", "epochs", "arguments"),
    [
        (4, 1.0, {}),
        (1, 0.3, {}),
        (4, 2.5, {"gradient_accumulation_steps": 3}),
        (2, 1.0, {"gradient_accumulation_steps": 100}),
        (2, 1.5, {"dataloader_drop_last": True}),
        (64, 1e-9, {"train_sampling_strategy": "group_by_length"}),
    ],
)
def test_the_trainer_takes_the_planned_steps_and_tokens(
    folder, count, batch_size, epochs, arguments
):
    tokens = tokens_of(folder, count)
    amount = {"local_steps": None, "local_epochs": epochs, "batch_size": batch_size}
    if arguments.get("dataloader_drop_last") and count < batch_size:
        with pytest.raises(
            DataError, match=f"{count} examples do not fill one batch of {batch_size}"
        ):
            train(new_model(folder), tokens, **DEFAULTS | amount, arguments=arguments)
        return
    model = new_model(folder)
    before = adapter_of(model)
    report = train(model, tokens, **DEFAULTS | amount, arguments=arguments)
    assert report.num_steps == count_steps(
        count, LocalTraining(learning_rate=1.0, arguments=arguments, **amount)
    )
    assert not same_bits(before, adapter_of(model))
    if epochs == 1.0:
        assert report.num_tokens == sum(map(len, tokens.input_ids)) - sum(tokens.num_prompt_tokens)


def test_a_run_with_a_client_smaller_than_a_batch_is_refused_by_name_before_it_starts(tmp_path):
    """Site0 trains on 9 examples, the others on 18 and 27."""
    drops = {"batch_size": 10, "arguments": {"dataloader_drop_last": True}}
    with pytest.raises(DataError, match="^site0: 9 examples do not fill one batch of 10"):
        prepare(tiny_config(tmp_path, training=drops), tmp_path / "run")
    config = tiny_config(tmp_path, training=drops | {"batch_size": 9}, federation={"num_rounds": 1})
    start(config, tmp_path / "run", function=None)
    row = timeless(tmp_path / "run")[1]
    assert (
        row["accepted"] == ["site0", "site1", "site2"] and row["clients"]["site0"]["num_steps"] == 2
    )


@pytest.mark.parametrize("amount", [{"local_steps": 4}, {"local_epochs": 0.5}])
def test_rows_in_order_that_no_round_reaches_the_end_of_are_refused(tmp_path, amount):
    (key, value), arguments = *amount.items(), {"train_sampling_strategy": "sequential"}
    few = {"local_steps": None, "arguments": arguments} | amount
    message = f"sequential with {key.replace('_', '-')} = {value}: .*local-epochs to 1 or more"
    with pytest.raises(ConfigError, match=message):
        prepare(tiny_config(tmp_path, training=few), tmp_path / "run")
    all_rows = {"local_steps": None, "local_epochs": 1.0, "arguments": arguments}
    config = tiny_config(tmp_path, training=all_rows)
    prepare(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be used with the reference centralized"):
        plan_runs(config, parse_methods("fedit,centralized", config), [0], tmp_path / "compared")


# ── warm-up ──


@given(st.integers(1, 1000), st.floats(0, 1, exclude_max=True))
def test_a_fraction_of_the_steps_always_leaves_one_at_the_full_rate(num_steps, fraction):
    warmup = count_warmup_steps(num_steps, {"warmup_steps": fraction})
    assert 0 <= warmup < num_steps and warmup <= math.ceil(fraction * num_steps)


def test_a_client_with_one_step_moves_though_others_warm_up(folder):
    plain, warmed = new_model(folder), new_model(folder)
    one = DEFAULTS | {"local_steps": 1}
    train(plain, tokens_of(folder, 4), **one)
    train(warmed, tokens_of(folder, 4), **one, arguments={"warmup_steps": 0.1})
    assert same_bits(adapter_of(plain), adapter_of(warmed))


@pytest.mark.parametrize("warmup", [4, 5, 1000])
def test_warming_up_longer_than_the_round_is_refused(folder, tmp_path, warmup):
    with pytest.raises(
        ConfigError, match=f"warmup_steps = {warmup} leaves none of this client's 4 local steps"
    ):
        train(
            new_model(folder), tokens_of(folder, 4), **DEFAULTS, arguments={"warmup_steps": warmup}
        )
    config = tiny_config(
        tmp_path, training={"local_steps": 4, "arguments": {"warmup_steps": warmup}}
    )
    with pytest.raises(ConfigError, match="^site0: training argument warmup_steps"):
        prepare(config, tmp_path / "run")


# ── values ──


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gradient_accumulation_steps": 0},
            "gradient_accumulation_steps: Expected `int` >= 1; the value is 0",
        ),
        (
            {"gradient_accumulation_steps": 1.5},
            "gradient_accumulation_steps: Expected `int`, got `float`",
        ),
        (
            {"label_smoothing_factor": 1.5},
            "label_smoothing_factor: Expected `float` < 1.0; the value is 1.5",
        ),
        ({"max_grad_norm": -1}, "max_grad_norm: Expected `float` >= 0.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm: Expected `float` >= 0.0"),
        ({"weight_decay": math.inf}, "weight_decay: Expected"),
        ({"weight_decay": True}, "weight_decay: Expected `float`, got `bool`"),
        ({"adam_beta1": "0.9"}, "adam_beta1: Expected `float`, got `str`; the value is '0.9'"),
        ({"adam_beta2": 1.0}, "adam_beta2: Expected `float` < 1.0"),
        ({"adam_epsilon": 0}, "adam_epsilon: Expected `float` > 0.0"),
        ({"warmup_steps": -1}, "warmup_steps: Expected `float` >= 0.0"),
        ({"warmup_steps": 2.5}, "warmup_steps must be whole, or below 1 as a fraction"),
        (
            {"warmup_steps": 2, "lr_scheduler_type": "constant"},
            "no effect with lr_scheduler_type constant",
        ),
        ({"dataloader_drop_last": "yes"}, "dataloader_drop_last: Expected `bool`, got `str`"),
        (
            {"train_sampling_strategy": "longest"},
            "train_sampling_strategy: Invalid enum value 'longest'",
        ),
        (
            {"gradient_checkpointing_kwargs": {"x": 1}},
            "gradient_checkpointing_kwargs: Object contains unknown field",
        ),
        ({"optim_args": 3}, "optim_args: Expected `str | null`, got `int`"),
        (
            {"lr_scheduler_kwargs": "a=1"},
            "lr_scheduler_kwargs: Expected `object | null`, got `str`",
        ),
    ],
)
def test_invalid_values_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "adam_w"}, "optim: transformers has no 'adam_w'"),
        (
            {"optim": "grokadamw"},  # of a package that is not installed
            "optim: the optimizer grokadamw cannot be made: .*grokadamw.*such as adamw_torch",
        ),
        (
            {"optim": "sgd", "optim_args": "momentun=0.9"},
            "optim_args: momentun has no effect on the optimizer sgd; wanted momentum, dampening",
        ),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9, weight_decay=0.1"},
            r"optim_args: weight_decay has no effect .*; set weight_decay in \[training.arguments\]",
        ),
        (
            {"optim_args": "amsgrad=true"},
            "amsgrad has no effect on the optimizer adamw_torch_fused; set adam_beta1",
        ),
        ({"optim": "adafactor", "optim_args": "eps=1"}, "eps has no effect .* adafactor; remove"),
        ({"optim": "sgd", "optim_args": "momentum"}, "'momentum' is not of the form name=value"),
        ({"lr_scheduler_type": "wavy"}, "lr_scheduler_type: transformers has no 'wavy'"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type: reduce_lr_on_plateau follows evaluations .*; use constant",
        ),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type: greedy follows evaluations"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            r"schedule cosine_with_min_lr cannot be made: .*kwargs = \{ min_lr_rate = 0.1 \}",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            r"cannot be made: .*'num_decay_steps'; .*kwargs = \{ num_decay_steps = 2 \}",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"x": 1}},
            "schedule cosine cannot be made: .*'x'; correct lr_scheduler_kwargs",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
            "schedule inverse_sqrt cannot be made: .* by zero; correct lr_scheduler_kwargs",
        ),
        (
            {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            "lr_scheduler_kwargs has no effect with lr_scheduler_type constant; name the schedule",
        ),
        (
            {"lr_scheduler_kwargs": {"x": 1}, "warmup_steps": 1},
            "lr_scheduler_kwargs has no effect with lr_scheduler_type constant_with_warmup",
        ),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1 has no effect on the optimizer sgd"),
        (
            {"optim": "lion_32bit", "adam_epsilon": 1e-6},
            "adam_epsilon has no effect on the optimizer lion_32bit; .*use adamw_torch",
        ),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs has no effect without gradient_checkpointing",
        ),
    ],
)
def test_optimizers_that_transformers_cannot_build_are_refused_by_name(
    folder, tmp_path, arguments, message
):
    with pytest.raises(ConfigError, match=message):
        train(new_model(folder), tokens_of(folder, 4), **DEFAULTS, arguments=arguments)
    config = tiny_config(tmp_path, training={"arguments": arguments})
    with pytest.raises(ConfigError, match=message):
        prepare(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        prepare_client(config, "site0", tmp_path / "store")


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2", "adam_epsilon"])
@pytest.mark.parametrize("optim", OptimizerNames)
def test_arguments_are_refused_exactly_where_transformers_does_not_read_them(optim, name, tmp_path):
    made = []
    for value in (0.5, 0.25):
        arguments = TrainingArguments(str(tmp_path), optim=optim, **{name: value})
        try:
            made.append(Trainer.get_optimizer_cls_and_kwargs(arguments))
        except (ImportError, ValueError) as error:
            pytest.skip(f"{optim.value} is not installed: {error}")
    if made[0] != made[1]:
        refuse_unused_arguments({"optim": optim.value, name: 0.5})
        return
    with pytest.raises(ConfigError, match=f"{name} has no effect on the optimizer {optim.value}"):
        refuse_unused_arguments({"optim": optim.value, name: 0.5})


@pytest.mark.parametrize("schedule", SchedulerType)
def test_options_of_schedules_are_refused_exactly_where_transformers_does_not_read_them(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    options = {"no_such_option": 1}
    arguments = {"lr_scheduler_type": schedule.value, "lr_scheduler_kwargs": options}
    try:
        get_scheduler(schedule, optimizer, 1, 10, scheduler_specific_kwargs=options)
    except TypeError:
        refuse_unused_arguments(arguments)
        return
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs has no effect"):
        refuse_unused_arguments(arguments)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_that_are_installed_train(folder, optim):
    model = new_model(folder)
    before = adapter_of(model)
    assert train(model, tokens_of(folder, 4), **DEFAULTS, arguments={"optim": optim}).num_steps == 4
    assert not same_bits(before, adapter_of(model))


# ── the learning rates ──


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"warmup_steps": 2},
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.2, "gradient_accumulation_steps": 2},
    ],
)
def test_the_sum_of_the_learning_rates_is_that_of_the_steps(folder, monkeypatch, arguments):
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        assert {group["lr"] for group in self.param_groups} == {rates[-1]}
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    settings = DEFAULTS | {"local_steps": 8}
    for moments in (None, {}):
        rates.clear()
        report = train(
            new_model(folder),
            tokens_of(folder, 12),
            **settings,
            arguments=arguments,
            moments=moments,
        )
        assert len(rates) == 8 and report.learning_rate_sum == sum(rates)


def test_the_sum_of_a_linear_schedule_by_hand(folder):
    linear = {"lr_scheduler_type": "linear"}
    report = train(new_model(folder), tokens_of(folder, 12), **DEFAULTS, arguments=linear)
    assert report.learning_rate_sum == pytest.approx(1e-2 * (1 + 0.75 + 0.5 + 0.25))
    report = train(
        new_model(folder), tokens_of(folder, 12), **DEFAULTS, arguments={"warmup_steps": 2}
    )
    assert report.learning_rate_sum == pytest.approx(1e-2 * (0 + 0.5 + 1 + 1))


# ── what a step is made of ──


def test_the_reported_loss_is_that_of_an_evaluation_also_where_labels_are_smoothed(folder):
    tokens = tokens_of(folder, 6)
    settings = DEFAULTS | {"local_steps": 1, "batch_size": 6}
    plain, smoothed = new_model(folder), new_model(folder)
    wanted = train(plain, tokens, **settings)
    assert train(smoothed, tokens, **settings, arguments={"label_smoothing_factor": 0.3}) == wanted
    assert not same_bits(adapter_of(plain), adapter_of(smoothed))


def test_a_smoothed_step_is_plain_sgd_on_the_smoothed_loss(folder):
    tokens = tokens_of(folder, 5)
    model, reference = new_model(folder), new_model(folder)
    arguments = {"optim": "sgd", "max_grad_norm": 0.0, "label_smoothing_factor": 0.3}
    train(model, tokens, **DEFAULTS | {"local_steps": 1, "batch_size": 5}, arguments=arguments)
    loss, num_tokens = torch.tensor(0.0), 0
    for ids, num_prompt in zip(tokens.input_ids, tokens.num_prompt_tokens, strict=True):
        logits, answer = (
            reference(input_ids=torch.tensor([ids])).logits[0],
            torch.tensor(ids[num_prompt:]),
        )
        one = F.cross_entropy(
            logits[num_prompt - 1 : -1], answer, reduction="sum", label_smoothing=0.3
        )
        loss, num_tokens = loss + one, num_tokens + len(answer)
    (loss / num_tokens).backward()
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            wanted = parameter - DEFAULTS["learning_rate"] * parameter.grad
            torch.testing.assert_close(
                adapter_of(model)[name], wanted.detach(), atol=1e-6, rtol=1e-4
            )


@pytest.mark.parametrize("accumulated", [1, 2, 100])
def test_a_penalty_counts_once_a_step_however_many_batches_are_accumulated(folder, accumulated):
    """Three batches: with two accumulated, the second step of a pass has one only; with a hundred, the first has 3."""
    tokens = rows(tokens_of(folder, 6), range(6))
    model, reference = new_model(folder), new_model(folder)
    arguments = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": accumulated,
    }
    amount = {"local_steps": -(-3 // accumulated), "batch_size": 2, "learning_rate": 0.1}

    def penalty(of):
        return 5 * sum(p.square().sum() for p in of.parameters() if p.requires_grad)

    train(model, tokens, **DEFAULTS | amount, arguments=arguments, penalty=lambda: penalty(model))
    for first in range(0, 6, 2 * accumulated):
        batch = range(first, min(6, first + 2 * accumulated))
        loss, num_tokens = torch.tensor(0.0), 0
        for i in batch:
            ids, num_prompt = tokens.input_ids[i], tokens.num_prompt_tokens[i]
            answer = torch.tensor(ids[num_prompt:])
            logits = reference(input_ids=torch.tensor([ids])).logits[0]
            loss = loss + F.cross_entropy(logits[num_prompt - 1 : -1], answer, reduction="sum")
            num_tokens += len(answer)
        (loss / num_tokens + penalty(reference)).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    for name, wanted in adapter_of(reference).items():
        torch.testing.assert_close(adapter_of(model)[name], wanted, atol=1e-6, rtol=1e-4)


def test_no_clipping_at_a_norm_of_zero(folder):
    model, reference = new_model(folder), new_model(folder)
    settings = DEFAULTS | {"local_steps": 1, "learning_rate": 1.0}
    train(model, tokens_of(folder, 4), **settings, arguments={"optim": "sgd", "max_grad_norm": 0})
    train(
        reference,
        tokens_of(folder, 4),
        **settings,
        arguments={"optim": "sgd", "max_grad_norm": 1e9},
    )
    assert same_bits(adapter_of(model), adapter_of(reference))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "sgdd"}, "optim: transformers has no 'sgdd'; did you mean sgd?"),
        ({"lr_scheduler_type": "cosin"}, "has no 'cosin'; did you mean cosine?"),
        ({"optim": "?"}, "has no '?'; known are adamw_torch"),
    ],
)
def test_an_unknown_optimizer_or_schedule_is_refused_before_anything_runs(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_arguments(arguments)


def test_the_defaults_are_those_of_the_trainer(tmp_path):
    made = trainer_arguments_from({}, output_dir=str(tmp_path))
    for name, value in msgspec.structs.asdict(TrainingFields()).items():
        assert getattr(made, name) == value, name


def test_the_optimizers_and_schedules_of_transformers_are_known():
    check_arguments({"optim": "adafactor", "lr_scheduler_type": "cosine_with_restarts"})
    check_arguments({"optim": "sgd", "lr_scheduler_type": "linear"})
