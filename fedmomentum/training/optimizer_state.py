"""A torch optimizer's state as moments by parameter name: set before training, read afterward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedmomentum.aggregation.moments import Moments
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.utils.text import printable


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, by the names of `named_parameters`."""
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameters[name] = parameter
    return parameters


def set_moments(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Moments]
) -> None:
    """Make an optimizer continue from copies of moments; parameters without moments start fresh.

    Call this before the first step. SGD does not count its steps, so counting starts here too.

    Args:
        optimizer: `torch.optim.AdamW`, `Adam`, or `SGD` with momentum.
        parameters: The parameters that the optimizer trains, by name.
        moments: The moments of some of them, in any floating-point dtype and on any device.

    Raises:
        ConfigError: If the optimizer does not keep such moments.
        ModelError: If `check_moments` rejects the moments, or they are from another optimizer.
    """
    _check_kind(optimizer)
    # Check everything first, so that an error cannot leave only some parameters set.
    check_moments(moments, parameters)
    is_sgd = isinstance(optimizer, SGD)
    group_of = _groups_by_parameter(optimizer)
    for name, value in moments.items():
        if parameters[name] not in group_of:
            raise ModelError(f"moments of {name}: the optimizer does not train this parameter")
        if (value.second is None) != is_sgd:
            origin = "SGD" if value.second is None else "Adam"
            raise ModelError(
                f"moments of {name}: they are {origin}'s, and the optimizer is "
                f"{type(optimizer).__name__}; continue with the same optimizer, or start without "
                "moments"
            )
    # Adam counts its steps itself. Register only once, however often this is called.
    if is_sgd and _count_step not in optimizer._optimizer_step_post_hooks.values():
        optimizer.register_step_post_hook(_count_step)

    for name, value in moments.items():
        parameter = parameters[name]
        first = _copy_like(parameter, value.first)
        if value.second is None:
            state: dict[str, Any] = {"step": value.step, "momentum_buffer": first}
        else:
            state = {
                "step": _step_tensor(group_of[parameter], parameter, value.step),
                "exp_avg": first,
                "exp_avg_sq": _copy_like(parameter, value.second),
            }
        optimizer.state[parameter] = state


def read_moments(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Moments]:
    """Return copies of an optimizer's moments, in float32 on the parameters' devices.

    Args:
        optimizer: `torch.optim.AdamW`, `Adam`, or `SGD` with momentum, for which `set_moments` was
            called, possibly with no moments, for a fresh start.
        parameters: The parameters that the optimizer trains, by name.

    Returns:
        The moments by name. Parameters that never had a gradient are left out, as they have none.

    Raises:
        ConfigError: If the optimizer does not keep such moments.
        ModelError: If a moment is not finite, or SGD's steps were not counted.
    """
    _check_kind(optimizer)
    moments = {}
    for name, parameter in parameters.items():
        # `state` is a defaultdict, so indexing would create an entry.
        state = optimizer.state.get(parameter)
        if not state:
            continue
        if "step" not in state:
            raise ModelError(
                f"moments of {name}: the optimizer's steps were not counted; call set_moments "
                "before the first step, with {} for a fresh start"
            )
        is_sgd = isinstance(optimizer, SGD)
        first = _float32_copy(state["momentum_buffer" if is_sgd else "exp_avg"])
        second = None if is_sgd else _float32_copy(state["exp_avg_sq"])
        moments[name] = Moments(first, second, int(state["step"]))
    check_moments(moments, parameters)
    return moments


def check_moments(moments: Mapping[str, Moments], parameters: Mapping[str, nn.Parameter]) -> None:
    """Reject moments that do not belong to the trained parameters, or cannot be used.

    Args:
        moments: Moments by parameter name; parameters may be missing.
        parameters: The trained parameters by name.

    Raises:
        ModelError: If a name is unknown, a shape does not match, a number is not finite, a second
            moment is negative, or a step is below 1.
    """
    for name, value in moments.items():
        if name not in parameters:
            raise ModelError(
                f"moments of {printable(str(name), 200)}: the model trains no parameter of this "
                "name; leave them out"
            )
        if not isinstance(value, Moments):
            raise ModelError(f"moments of {name}: got {type(value).__name__}; wanted Moments")
        if not isinstance(value.step, int) or value.step < 1:
            raise ModelError(
                f"moments of {name}: step = {value.step!r}; wanted the number of optimizer steps "
                "behind them, at least 1"
            )
        _check_tensor(f"the first moment of {name}", value.first, parameters[name])
        if value.second is not None:
            _check_tensor(f"the second moment of {name}", value.second, parameters[name])
            if (value.second < 0).any():
                raise ModelError(
                    f"the second moment of {name} has a number below 0; it is a mean of squares"
                )


def _check_tensor(title: str, tensor: Tensor, parameter: nn.Parameter) -> None:
    """Reject a moment that is not finite, or does not have its parameter's shape."""
    if not isinstance(tensor, Tensor):
        raise ModelError(f"{title}: got {type(tensor).__name__}; wanted a tensor")
    if tensor.shape != parameter.shape:
        raise ModelError(
            f"{title} has the shape {tuple(tensor.shape)}; wanted {tuple(parameter.shape)}, its "
            "parameter's"
        )
    if not tensor.is_floating_point():
        raise ModelError(f"{title} has the dtype {tensor.dtype}; wanted a floating-point dtype")
    if not tensor.isfinite().all():
        raise ModelError(
            f"{title} is not finite; lower the learning rate, or start without moments"
        )


def _check_kind(optimizer: Optimizer) -> None:
    """Reject an optimizer whose state is not what `Moments` describes."""
    name = type(optimizer).__name__
    groups = optimizer.param_groups
    # AdamW is not a subclass of Adam in older versions of torch.
    if isinstance(optimizer, (Adam, AdamW)):
        if any(group["amsgrad"] for group in groups):
            raise ConfigError(
                f"the optimizer {name} with amsgrad has a third moment, which cannot be set or "
                "read; use it without amsgrad"
            )
    elif isinstance(optimizer, SGD):
        if not all(group["momentum"] > 0 for group in groups):
            raise ConfigError(
                f"the optimizer {name} without momentum has no state to set or read; give it a "
                "momentum above 0 (if optim_args has one, update transformers: old versions ignore "
                "it)"
            )
    else:
        raise ConfigError(
            f"the state of the optimizer {name} cannot be set or read as moments; use "
            "torch.optim.AdamW, Adam, or SGD with momentum"
        )


def _groups_by_parameter(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Return the optimizer's parameter group of each parameter."""
    result = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            result[parameter] = group
    return result


def _step_tensor(group: Mapping[str, Any], parameter: Tensor, step: int) -> Tensor:
    """Return Adam's step count as torch keeps it: on the CPU unless fused or capturable."""
    on_device = group["fused"] or group["capturable"]
    device = parameter.device if on_device else torch.device("cpu")
    return torch.tensor(float(step), dtype=torch.float32, device=device)


def _copy_like(parameter: Tensor, moment: Tensor) -> Tensor:
    """Return a copy of a moment with its parameter's dtype, device and strides."""
    result = torch.empty_like(parameter, memory_format=torch.preserve_format)
    return result.detach().copy_(moment.detach())


def _float32_copy(moment: Tensor) -> Tensor:
    return moment.detach().to(torch.float32, copy=True)


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of SGD, increase the step count of each parameter that took part in it."""
    del args, kwargs
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = optimizer.state[parameter]
                state["step"] = state.get("step", 0) + 1
