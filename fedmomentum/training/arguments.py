"""Which `transformers.TrainingArguments` a user may set, and the resulting number of steps.

The server computes the number of steps too, so this module imports transformers only to explain an
unknown name, and to check that of an optimizer or a schedule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedmomentum.errors import ConfigError, DataError
from fedmomentum.utils.schema import Schema, validation_message
from fedmomentum.utils.text import printable, short_repr

if TYPE_CHECKING:
    from fedmomentum.config.training import LocalTraining


# Upper limits: float64 overflows not far above 1e300, and counts fit into 32 bits.
_NotNegative = Annotated[float, Meta(ge=0, le=1e300)]
_Beta = Annotated[float, Meta(ge=0, lt=1)]

# 0.1 * 30 is slightly above 3: without this relative tolerance, a step would be added.
STEPS_RTOL = 1e-12


class CheckpointingFields(Schema, frozen=True, kw_only=True):
    """The keyword arguments of torch's `checkpoint` that a user may set."""

    use_reentrant: bool = False
    preserve_rng_state: bool = True


class TrainingFields(Schema, frozen=True, kw_only=True):
    """The fields of `transformers.TrainingArguments` that a user may set, with their valid values.

    These are the fields known to affect local training without leaving traces on a model that other
    clients train next. The defaults are those of local training: transformers' own, but for the
    learning rate's schedule, which is constant.
    """

    adam_beta1: _Beta = 0.9
    adam_beta2: _Beta = 0.999
    adam_epsilon: Annotated[float, Meta(gt=0, le=1e300)] = 1e-8
    dataloader_drop_last: bool = False
    gradient_accumulation_steps: Annotated[int, Meta(ge=1, le=2**31)] = 1
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: CheckpointingFields | None = None
    label_smoothing_factor: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    lr_scheduler_kwargs: dict[str, Any] | None = None
    lr_scheduler_type: str = "constant"
    max_grad_norm: _NotNegative = 1.0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    warmup_steps: _NotNegative = 0
    weight_decay: _NotNegative = 0.0


ALLOWED_ARGUMENTS = frozenset(TrainingFields.__struct_fields__)
"""The names of `TrainingFields`."""

DEFAULT_OPTIMIZER = TrainingFields().optim
"""The optimizer, unless configured."""

CONFIGURED_ARGUMENTS = {
    "learning_rate": "training.learning-rate",
    "max_steps": "training.local-steps",
    "num_train_epochs": "training.local-epochs",
    "per_device_train_batch_size": "training.batch-size",
    "seed": "run.seed",
    "data_seed": "run.seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "use_cpu": "model.device",
    "tf32": "model.tf32",
    "full_determinism": "run.deterministic",
    "output_dir": "the run's directory",
}
"""Fields determined by the run's configuration, each with the key that sets it."""

OPTIMIZERS_WITH_MOMENTS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimizers whose state can be set and read; for SGD, only with momentum."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Reject names that a user may not set, and values that training cannot use.

    Args:
        arguments: Fields of `transformers.TrainingArguments`.

    Raises:
        ConfigError: If there is such a name or value; the message says what to do instead.
    """
    unknown = [name for name in arguments if name not in ALLOWED_ARGUMENTS]
    if unknown:
        raise ConfigError(_explain_refusal(unknown[0]))
    try:
        fields = msgspec.convert(dict(arguments), TrainingFields)
    except msgspec.ValidationError as problem:
        message = validation_message(problem)
        name = message.partition(":")[0].partition(".")[0]
        value = short_repr(arguments.get(name))
        raise ConfigError(f"training argument {message}; the value is {value}") from problem
    for name in ("optim", "lr_scheduler_type"):
        if name in arguments:
            _check_choice(name, str(arguments[name]))
    # Combinations that the types cannot express.
    if fields.warmup_steps and arguments.get("lr_scheduler_type") == "constant":
        raise ConfigError(
            "training argument warmup_steps has no effect with lr_scheduler_type constant; set "
            "constant_with_warmup"
        )
    if fields.warmup_steps >= 1 and fields.warmup_steps != int(fields.warmup_steps):
        raise ConfigError(
            "training argument warmup_steps must be whole, or below 1 as a fraction of the steps; "
            f"got {fields.warmup_steps}"
        )


def _check_choice(name: str, value: str) -> None:
    """Refuse an optimizer or a schedule that transformers does not know, before anything runs.

    Raises:
        ConfigError: If it does not; the message names the nearest one.
    """
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    kinds = OptimizerNames if name == "optim" else SchedulerType
    known = [str(kind.value) for kind in kinds]
    if value not in known:
        nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        raise ConfigError(
            f"training argument {name}: transformers has no {short_repr(value)}; {hint}"
        )


def check_optimizer(arguments: Mapping[str, Any]) -> None:
    """Reject an optimizer whose state cannot be set before training and read afterward.

    Args:
        arguments: Fields of `transformers.TrainingArguments`.

    Raises:
        ConfigError: If the optimizer keeps anything other than elementwise moments.
    """
    name = str(arguments.get("optim", DEFAULT_OPTIMIZER))
    advice = (
        'set training.optimizer-state = "fresh", or use adamw_torch, adamw_torch_fused, or sgd '
        'with momentum (optim = "sgd", optim_args = "momentum=0.9")'
    )
    if name not in OPTIMIZERS_WITH_MOMENTS:
        raise ConfigError(
            f"training argument optim: the state of the optimizer {printable(name, 100)} cannot "
            f"be carried over; {advice}"
        )
    options = optimizer_options(arguments)
    if name == "sgd":
        momentum = options.get("momentum", "0")
        if not _is_above_0(momentum):
            raise ConfigError(
                f"training argument optim: sgd with momentum {printable(momentum, 100)} has no "
                f"state that could be carried over; {advice}"
            )
    elif options.get("amsgrad", "false").lower() not in ("false", "0", "no"):
        raise ConfigError(
            f"training argument optim_args: {name} with amsgrad keeps a maximum besides its "
            f"moments, which cannot be carried over; remove amsgrad, or {advice}"
        )


def optimizer_options(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Parse `optim_args`, a string such as "momentum=0.9, dampening=0.1", into values by name."""
    # Parse it as transformers does: spaces are ignored, and the last of duplicate names wins.
    options = {}
    text = str(arguments.get("optim_args") or "")
    for assignment in text.replace(" ", "").split(","):
        key, _, value = assignment.partition("=")
        if key:
            options[key] = value
    return options


def _is_above_0(text: str) -> bool:
    """Return whether a string is a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        return False
    return math.isfinite(number) and number > 0


def _explain_refusal(name: str) -> str:
    """Explain why a name cannot be set, and what to do instead."""
    from dataclasses import fields

    from transformers import TrainingArguments  # slow to import, and needed only here

    if name in CONFIGURED_ARGUMENTS:
        key = CONFIGURED_ARGUMENTS[name]
        return f"training argument {name} is decided by the run: set {key} instead"
    if name in {field.name for field in fields(TrainingArguments)}:
        return (
            f"training argument {name} cannot be set here: it has no effect on local training, or "
            "would leave traces that the next client sees. Those that can be set: "
            f"{', '.join(sorted(ALLOWED_ARGUMENTS))}"
        )
    known = [*ALLOWED_ARGUMENTS, *CONFIGURED_ARGUMENTS]
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown training argument {name}; the nearest known is {similar[0]}"


def check_hyperparameters(hyperparameters: LocalTraining) -> None:
    """Reject hyperparameters that are out of range.

    Raises:
        ConfigError: If a number is not finite and above 0, steps and epochs are both given or both
            missing, or `check_arguments` rejects an argument.
    """
    check_arguments(hyperparameters.arguments)
    local_steps = hyperparameters.local_steps
    local_epochs = hyperparameters.local_epochs
    if (local_steps is None) == (local_epochs is None):
        raise ConfigError(
            f"exactly one of local-steps and local-epochs must be given; got {local_steps} and "
            f"{local_epochs}"
        )
    amounts = {
        "learning-rate": hyperparameters.learning_rate,
        "local-steps": local_steps,
        "local-epochs": local_epochs,
        "batch-size": hyperparameters.batch_size,
    }
    for key, value in amounts.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{key} must be above 0; got {value}")


def count_steps(num_examples: int, hyperparameters: LocalTraining) -> int:
    """Return how many optimizer steps a client takes in a round.

    That is ``local_steps``, or ``local_epochs`` passes over the examples, rounded up to whole
    steps. The last step of a pass may accumulate fewer batches, and its last batch may contain
    fewer examples.

    Args:
        num_examples: Number of the client's training examples.
        hyperparameters: The hyperparameters of the round.

    Returns:
        The number of steps, at least 1.

    Raises:
        DataError: If ``dataloader_drop_last`` leaves no batch at all.
    """
    arguments = hyperparameters.arguments
    batch_size = hyperparameters.batch_size
    if arguments.get("dataloader_drop_last"):
        num_batches = num_examples // batch_size
    else:
        num_batches = math.ceil(num_examples / batch_size)
    if num_batches == 0:
        raise DataError(
            f"{num_examples} examples do not fill one batch of {batch_size}, and "
            "dataloader_drop_last leaves out batches that are not full, so nothing is left to "
            "train on: lower training.batch-size, or remove dataloader_drop_last from "
            "[training.arguments]"
        )
    if hyperparameters.local_steps is not None:
        return hyperparameters.local_steps
    # Accumulated batches make one step.
    assert hyperparameters.local_epochs is not None
    batches_per_step: int = arguments.get("gradient_accumulation_steps", 1)
    steps_per_epoch = math.ceil(num_batches / batches_per_step)
    num_steps = hyperparameters.local_epochs * steps_per_epoch
    return max(1, math.ceil(num_steps * (1 - STEPS_RTOL)))


def count_warmup_steps(num_steps: int, arguments: Mapping[str, Any]) -> int:
    """Return how many of a client's steps are warm-up, leaving at least one step after it.

    The learning rate of warm-up step k (from 0) is k / (number of warm-up steps) of the full one,
    so a client with only warm-up steps would hardly move, and with a single one not at all.

    Args:
        num_steps: Number of steps that the client takes in a round.
        arguments: Fields of `transformers.TrainingArguments`; ``warmup_steps`` below 1 is a
            fraction of the steps.

    Returns:
        The number of warm-up steps.

    Raises:
        ConfigError: If the number of warm-up steps leaves no step at the full learning rate.
    """
    warmup: float = arguments.get("warmup_steps", 0)
    if warmup < 1:  # a fraction of the steps
        return min(math.ceil(warmup * num_steps), num_steps - 1)
    if warmup >= num_steps:
        raise ConfigError(
            f"training argument warmup_steps = {warmup:g} leaves none of this client's {num_steps} "
            "local steps at the full learning rate (each round starts with a warm-up of its own): "
            "lower it, or give a fraction of the steps, such as 0.1"
        )
    return int(warmup)


def check_num_examples(num_examples: int, hyperparameters: LocalTraining, owner: str) -> None:
    """Reject, before a run starts, a client with too few examples for the run's settings.

    Args:
        num_examples: Number of the client's training examples.
        hyperparameters: The hyperparameters of a round.
        owner: The owner of the examples, for the message.

    Raises:
        DataError: If nothing is left to train on.
        ConfigError: If all of the client's steps would be warm-up.
    """
    try:
        num_steps = count_steps(num_examples, hyperparameters)
        count_warmup_steps(num_steps, hyperparameters.arguments)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{owner}: {error}") from None
