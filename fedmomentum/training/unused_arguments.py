"""Training arguments that transformers accepts and then does not use.

A user who sets one expects an effect, so they are refused. A user's own training function may read
any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmomentum.errors import ConfigError
from fedmomentum.training.arguments import DEFAULT_OPTIMIZER, optimizer_options
from fedmomentum.utils.text import printable, short_repr

OPTIMIZER_OPTIONS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
"""What transformers reads from `optim_args`, by optimizer; anything else would have no effect."""

ADAM_ARGUMENTS = ("adam_beta1", "adam_beta2", "adam_epsilon")
OPTIMIZERS_WITHOUT_ADAM = (
    "adafactor",
    "adagrad",
    "adalomo",
    "galore",
    "grokadamw",
    "lomo",
    "rmsprop",
    "schedule_free_sgd",
    "sgd",
)
"""The beginnings of the names of optimizers for which `ADAM_ARGUMENTS` are not read."""
SCHEDULES_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
"""Schedules for which `lr_scheduler_kwargs` are not read."""


def refuse_unused_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that would have no effect next to the others.

    Args:
        arguments: Fields of `transformers.TrainingArguments`.

    Raises:
        ConfigError: If there are any; the message names the argument and what to do.
    """
    check_optimizer_options(arguments)
    optimizer = str(arguments.get("optim", DEFAULT_OPTIMIZER))
    for name in ADAM_ARGUMENTS:
        # Lion has betas, but no epsilon.
        is_unused = optimizer.startswith(OPTIMIZERS_WITHOUT_ADAM) or (
            name == "adam_epsilon" and "lion" in optimizer
        )
        if name in arguments and is_unused:
            raise ConfigError(
                f"training argument {name} has no effect on the optimizer "
                f"{printable(optimizer, 100)}; remove it, or use adamw_torch or adamw_torch_fused"
            )
    # A warm-up makes the constant schedule another one.
    default = "constant_with_warmup" if arguments.get("warmup_steps") else "constant"
    schedule = str(arguments.get("lr_scheduler_type", default))
    if arguments.get("lr_scheduler_kwargs") and schedule in SCHEDULES_WITHOUT_OPTIONS:
        raise ConfigError(
            f"training argument lr_scheduler_kwargs has no effect with lr_scheduler_type "
            f"{schedule}; name the schedule that it is for, such as cosine_with_min_lr, or remove "
            "it"
        )
    checkpointing = arguments.get("gradient_checkpointing_kwargs")
    if checkpointing is not None and not arguments.get("gradient_checkpointing"):
        raise ConfigError(
            "training argument gradient_checkpointing_kwargs has no effect without "
            "gradient_checkpointing; set gradient_checkpointing = true, or remove it"
        )


def check_optimizer_options(arguments: Mapping[str, Any]) -> None:
    """Refuse options of an optimizer that transformers cannot parse or would ignore.

    Args:
        arguments: Fields of `transformers.TrainingArguments`.

    Raises:
        ConfigError: If `optim_args` has any; the message names it and what can be given.
    """
    text = str(arguments.get("optim_args") or "").replace(" ", "")
    for assignment in text.split(",") if text else ():
        if assignment.count("=") != 1:
            raise ConfigError(
                f"training argument optim_args: {short_repr(assignment)} is not of the "
                "form name=value; wanted such pairs with commas between them, for example "
                '"momentum=0.9, nesterov=true"'
            )
    name = str(arguments.get("optim", DEFAULT_OPTIMIZER))
    known = OPTIMIZER_OPTIONS.get(name)
    if known is None:
        return
    for option in optimizer_options(arguments):
        if option in known:
            continue
        if option == "weight_decay":
            advice = "set weight_decay in [training.arguments] itself"
        elif name.startswith("adamw"):
            advice = "set adam_beta1, adam_beta2 or adam_epsilon in [training.arguments], or none"
        else:
            advice = f"wanted {', '.join(known)}" if known else "remove it"
        raise ConfigError(
            f"training argument optim_args: {printable(option, 100)} has no effect on the "
            f"optimizer {name}; {advice}"
        )
