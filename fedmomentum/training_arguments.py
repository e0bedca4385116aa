"""What a user may set of ``transformers.TrainingArguments``, and how many optimizer steps a client makes with it.

The server knows the number of steps too, so nothing here imports transformers until a name is not found.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedmomentum.errors import ConfigError, DataError
from fedmomentum.schema import Schema, printable, readable

_NotNegative = Annotated[float, Meta(ge=0, le=1e300)]
_Beta = Annotated[float, Meta(ge=0, lt=1)]


class CheckpointingFields(Schema, frozen=True, kw_only=True):
    """The keywords of torch's ``checkpoint`` which a user may set."""

    use_reentrant: bool = False
    preserve_rng_state: bool = True


class TrainingFields(Schema, frozen=True, kw_only=True):
    """The fields of ``transformers.TrainingArguments`` which a user may set, with the values that make sense.

    Those are the fields known to have an effect on local training, and to leave nothing behind on a model that other
    clients train next. The defaults are not used: what is left out is decided by transformers.
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
    optim: str = "adamw_torch"
    optim_args: str | None = None
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    warmup_steps: _NotNegative = 0
    weight_decay: _NotNegative = 0.0


PASSED_ON = frozenset(TrainingFields.__struct_fields__)
"""The names of `TrainingFields`."""

SET_ELSEWHERE = {
    "learning_rate": "training.learning-rate",
    "max_steps": "training.local-steps",
    "num_train_epochs": "training.local-epochs",
    "per_device_train_batch_size": "training.batch-size",
    "seed": "run.seed",
    "data_seed": "run.seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "use_cpu": "model.device",
    "output_dir": "the run's folder",
}
"""Fields which the run's own configuration decides, and the key that does."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse names that a user may not set, and values that training cannot use; the message says what to do instead.

    Raises:
        ConfigError: For the first such name, else for the first such value.
    """
    unknown = [name for name in arguments if name not in PASSED_ON]
    if unknown:
        raise ConfigError(_why_refused(unknown[0]))
    try:
        fields = msgspec.convert(dict(arguments), TrainingFields)
    except msgspec.ValidationError as problem:
        text = readable(problem)
        value = arguments.get(text.partition(":")[0].partition(".")[0])
        raise ConfigError(f"training argument {text}; the value is {printable(repr(value), 100)}") from problem
    if fields.warmup_steps and arguments.get("lr_scheduler_type") == "constant":
        raise ConfigError(
            "training argument warmup_steps has no effect with lr_scheduler_type constant; set constant_with_warmup"
        )
    if fields.warmup_steps >= 1 and fields.warmup_steps != int(fields.warmup_steps):
        raise ConfigError(
            f"training argument warmup_steps must be whole, or below 1 as a fraction of the steps; got "
            f"{fields.warmup_steps}"
        )


def _why_refused(name: str) -> str:
    """Say why a name cannot be set, and what to do instead."""
    from dataclasses import fields

    from transformers import TrainingArguments  # slow to import, and needed only here

    if name in SET_ELSEWHERE:
        return f"training argument {name} is decided by the run: set {SET_ELSEWHERE[name]} instead"
    if name in {field.name for field in fields(TrainingArguments)}:
        return (
            f"training argument {name} cannot be set here: it has no effect on local training, or would leave traces "
            f"that the next client sees. Those that can be set: {', '.join(sorted(PASSED_ON))}"
        )
    close = difflib.get_close_matches(name, [*PASSED_ON, *SET_ELSEWHERE], n=1, cutoff=0.0)
    return f"unknown training argument {name}; the nearest known is {close[0]}"


def count_steps(
    num_examples: int,
    *,
    local_steps: int | None,
    local_epochs: float | None,
    batch_size: int,
    arguments: Mapping[str, Any],
) -> int:
    """Return how many optimizer steps a client makes in a round.

    ``local_steps``, or ``local_epochs`` passes over the examples, rounded up to whole steps. The last step of a pass
    may take fewer batches than are accumulated, and a batch fewer examples than it can have.

    Raises:
        DataError: If ``dataloader_drop_last`` leaves no batch at all.
    """
    if arguments.get("dataloader_drop_last"):
        num_batches = num_examples // batch_size
    else:
        num_batches = math.ceil(num_examples / batch_size)
    if num_batches == 0:
        raise DataError(
            f"{num_examples} examples do not fill one batch of {batch_size}, and dataloader_drop_last leaves out "
            "batches that are not full, so nothing is left to train on: lower training.batch-size, or take "
            "dataloader_drop_last out of [training.arguments]"
        )
    if local_steps is not None:
        return local_steps
    assert local_epochs is not None
    steps_per_pass = math.ceil(num_batches / arguments.get("gradient_accumulation_steps", 1))
    # 0.1 * 30 is a hair above 3: without the tolerance a whole step would be added.
    return max(1, math.ceil(local_epochs * steps_per_pass * (1 - 1e-12)))


def count_warmup(num_steps: int, arguments: Mapping[str, Any]) -> int:
    """Return how many of a client's steps are warm-up, at least one less than it makes.

    The learning rate of warm-up step k (from 0) is k / warm-up steps of the full one, so that a client which only
    warms up would hardly move, and with a single step not at all.

    Raises:
        ConfigError: If a number of warm-up steps is asked for that leaves no step at the full learning rate.
    """
    warmup = arguments.get("warmup_steps", 0)
    if warmup < 1:  # a fraction of the steps
        return min(math.ceil(warmup * num_steps), num_steps - 1)
    if warmup >= num_steps:
        raise ConfigError(
            f"training argument warmup_steps = {warmup:g} leaves none of this client's {num_steps} local steps at the "
            "full learning rate (each round warms up anew): lower it, or give a fraction of the steps, such as 0.1"
        )
    return int(warmup)


def check_amount(
    num_examples: int,
    *,
    local_steps: int | None,
    local_epochs: float | None,
    batch_size: int,
    arguments: Mapping[str, Any],
    owner: str,
) -> None:
    """Refuse, before a run starts, a client whose examples are too few for the run's settings.

    Raises:
        DataError: If nothing is left to train on; names the owner.
        ConfigError: If all of its steps would be warm-up; names the owner.
    """
    try:
        num_steps = count_steps(
            num_examples,
            local_steps=local_steps,
            local_epochs=local_epochs,
            batch_size=batch_size,
            arguments=arguments,
        )
        count_warmup(num_steps, arguments)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{owner}: {error}") from None
