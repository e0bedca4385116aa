"""Modules of a torch model: float32 ones in a 16-bit model, the model inside a PEFT wrapper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def inner_model(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, adapters included; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cast_around(module: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Let a module compute in float32 inside a model of another dtype.

    Its inputs are cast to float32, and its outputs back.

    Args:
        module: A module whose floating-point parameters are in float32.
        dtype: The dtype of the model around it.

    Returns:
        Handles whose ``remove`` undoes it.
    """
    if dtype == torch.float32:
        return []

    def cast_inputs(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _cast(args, torch.float32), _cast(kwargs, torch.float32)

    def cast_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, dtype)

    return [
        module.register_forward_pre_hook(cast_inputs, with_kwargs=True),
        module.register_forward_hook(cast_output),
    ]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast every floating-point tensor in a value, also in tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def outermost_owners(names: Iterable[str]) -> list[str]:
    """Return the modules to cast around, given the names of all tensors in float32.

    A tensor's owner is the module that it is a direct part of. Where one owner lies in another, the
    outer one suffices: everything inside it computes in float32.
    """
    owners = {name.rpartition(".")[0] for name in names}
    outermost = []
    for owner in owners:
        if not any(owner.startswith(f"{other}.") for other in owners):
            outermost.append(owner)
    return sorted(outermost)
