"""The trainer's arguments, its optimizer and its schedule, and a check that they can be made."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from fedmomentum.errors import ConfigError
from fedmomentum.training.arguments import count_warmup_steps
from fedmomentum.training.hf_trainer import LocalTrainingArguments, TrainableView
from fedmomentum.training.isolation import global_state_restored
from fedmomentum.training.unused_arguments import refuse_unused_arguments

if TYPE_CHECKING:
    from fedmomentum.config.training import TrainingConfig

SCHEDULES_WITH_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow evaluations in the course of a training; local training has none."""
SCHEDULE_EXAMPLES = {
    "cosine_with_min_lr": "{ min_lr_rate = 0.1 }",
    "cosine_warmup_with_min_lr": "{ min_lr_rate = 0.1 }",
    "warmup_stable_decay": "{ num_decay_steps = 2 }",
}
"""Schedules that cannot do without `lr_scheduler_kwargs`, each with an example."""
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    RuntimeError,
    TypeError,
    ValueError,
)


def with_warmup(arguments: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Return the user's arguments, with the warm-up as a number of steps.

    Raises:
        ConfigError: If the warm-up leaves no step at the full learning rate.
    """
    result = dict(arguments)
    if "warmup_steps" in result:
        result["warmup_steps"] = count_warmup_steps(num_steps, result)
        # The plain constant schedule would ignore it.
        result.setdefault("lr_scheduler_type", "constant_with_warmup")
    return result


def device_arguments(device: torch.device) -> dict[str, Any]:
    """Return the trainer's arguments that depend on the model's device."""
    return {
        "model_device": str(device),
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
    }


def trainer_arguments_from(arguments: dict[str, Any], **configured: Any) -> LocalTrainingArguments:
    """Return the trainer's arguments.

    Args:
        arguments: The user's arguments.
        configured: Arguments determined by the run.

    Returns:
        Both, plus those that keep the trainer silent.

    Raises:
        ConfigError: If the schedule needs evaluations, an argument would have no effect, or
            transformers rejects a value.
    """
    refuse_unused_arguments(arguments)
    schedule = str(arguments.get("lr_scheduler_type"))
    if schedule in SCHEDULES_WITH_EVALUATION:
        raise ConfigError(
            f"training argument lr_scheduler_type: {schedule} follows evaluations in the course of "
            "a training, and local training has none; use constant, linear or cosine, or "
            "training.learning-rate-schedule for a schedule over the rounds"
        )
    silent = {
        # `LossRecorder` rejects NaN and Inf; the filter would read the loss twice more per step.
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    options = {"lr_scheduler_type": "constant", **arguments, **configured, **silent}
    try:
        return LocalTrainingArguments(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"[training.arguments] cannot be used: {_first_line(error)}") from error


def create_optimizer(trainer: Trainer, num_steps: int) -> Optimizer:
    """Create the trainer's optimizer and schedule, which it would otherwise create itself.

    Returns:
        The optimizer; the trainer wraps it when it starts.

    Raises:
        ConfigError: If the optimizer's package or an argument of the optimizer or schedule is
            missing or invalid.
    """
    try:
        trainer.create_optimizer()
    except _BUILD_ERRORS as error:
        name = getattr(trainer.args.optim, "value", trainer.args.optim)
        raise ConfigError(
            f"training argument optim: the optimizer {name} cannot be made: {_first_line(error)}; "
            "install its package wherever clients train, correct optim_args, or use another, such "
            "as adamw_torch"
        ) from error
    try:
        trainer.create_scheduler(num_training_steps=num_steps)
    except _BUILD_ERRORS as error:
        schedule = getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type)
        example = SCHEDULE_EXAMPLES.get(schedule)
        raise ConfigError(
            f"training argument lr_scheduler_type: the schedule {schedule} cannot be made: "
            f"{_first_line(error)}; correct lr_scheduler_kwargs in [training.arguments]"
            + (f", for example lr_scheduler_kwargs = {example}" if example else "")
        ) from error
    assert trainer.optimizer is not None
    return trainer.optimizer


def check_can_be_made(
    training: TrainingConfig, num_rounds: int, *, schedule_only: bool = False
) -> None:
    """Make a run's optimizer and schedule once, for a single weight; refuse unused arguments.

    Otherwise every client would fail in the first round.

    Args:
        training: The run's training settings.
        num_rounds: The run's number of rounds.
        schedule_only: Whether clients train elsewhere, where other packages may be installed.

    Raises:
        ConfigError: If one of them cannot be made, or an argument would have no effect; the message
            names the argument.
    """
    # A user's own function makes its own, and may read any argument.
    if training.function is not None:
        return
    given = dict(training.arguments)
    refuse_unused_arguments(given)
    if schedule_only:
        for name in ("optim", "optim_args"):
            given.pop(name, None)
    # What transformers chooses by itself can be made.
    names = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs")
    if not any(name in given for name in names):
        return
    # How many steps a client takes is not known yet, and does not matter here.
    num_steps = 10 + int(given.get("warmup_steps", 0))
    # Some schedules are bounded by the learning rate, which may decay over the rounds.
    for rate in {training.learning_rate_at(number, num_rounds) for number in (1, num_rounds)}:
        _make_once(with_warmup(given, num_steps), rate, num_steps)


def _make_once(arguments: dict[str, Any], learning_rate: float, num_steps: int) -> None:
    """Make an optimizer and a schedule for a single weight.

    Raises:
        ConfigError: If that is not possible.
    """
    weight = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    restored = global_state_restored(weight, undo_checkpointing=False)
    with restored, tempfile.TemporaryDirectory() as directory:
        trainer_arguments = trainer_arguments_from(
            arguments,
            **device_arguments(torch.device("cpu")),
            output_dir=directory,
            learning_rate=learning_rate,
            max_steps=num_steps,
        )
        trainer = Trainer(TrainableView(weight), trainer_arguments)
        create_optimizer(trainer, num_steps)


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
