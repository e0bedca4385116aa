"""Modules of a 16-bit model that compute in float32: their input is cast up and their output back. torch only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def cast_around(module: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Have a module compute in float32 inside a model of another dtype.

    Args:
        module: Its floating-point parameters are in float32.
        dtype: What the module's outputs are cast back to: that of the model around it.

    Returns:
        Handles whose ``remove`` undoes it.
    """
    if dtype == torch.float32:
        return []

    def up(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _cast(args, torch.float32), _cast(kwargs, torch.float32)

    def back(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, dtype)

    return [module.register_forward_pre_hook(up, with_kwargs=True), module.register_forward_hook(back)]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The value with every floating-point tensor in it, in tuples, lists and dictionaries too, in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def outermost_owners(names: Iterable[str]) -> list[str]:
    """Return the modules to cast around, given the names of all tensors that are held in float32.

    A tensor's owner is the module it is a direct part of. Where one owner lies in another, the outer one is enough:
    everything inside it computes in float32.
    """
    owners = {name.rpartition(".")[0] for name in names}
    return sorted(owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners))
