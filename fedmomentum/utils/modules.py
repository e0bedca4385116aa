"""Helpers for torch modules: float32 modules in 16-bit models, models in PEFT wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedmomentum.utils.quantized import is_quantized

# How far rounding may take a linear layer's output from `x W^T + b`, in units of the weight's eps.
FORWARD_TOL = 16


def inner_model(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, including adapters; return other models unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compute_logits(
    model: Any, tokens: Tensor, inputs: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return the model's logits for rows of tokens, from one forward pass without a cache.

    Args:
        model: The model.
        tokens: Token ids, `(rows, length)`.
        inputs: Additional inputs of the same shape, such as a mask.
    """
    device = next(model.parameters()).device
    # A PEFT wrapper's forward accepts any argument, so look at the model inside.
    parameters = inspect.signature(inner_model(model).forward).parameters
    arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    for name, tensor in (inputs or {}).items():
        arguments[name] = tensor.to(device)
    logits: Tensor = model(input_ids=tokens.to(device), **arguments).logits
    return logits


def is_plain_linear(layer: Any) -> bool:
    """Return whether a linear layer computes exactly `x W^T + b`.

    Expert routers, for example, do not. Merging an adapter into the weight of such a layer would
    not have the same effect as the adapter.
    """
    from transformers.pytorch_utils import Conv1D

    # Quantized layers differ from it only by rounding.
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or is_quantized(layer):
        return True
    weight = layer.weight.detach()
    if not isinstance(layer, Conv1D):
        weight = weight.mT
    x = torch.linspace(-1, 1, weight.shape[0], device=weight.device).to(weight.dtype)[None]
    expected = x @ weight
    if layer.bias is not None:
        expected = expected + layer.bias.detach()
    try:
        with torch.no_grad():
            result = layer(x)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False  # it expects inputs of another shape
    tolerance = FORWARD_TOL * torch.finfo(weight.dtype).eps
    return isinstance(result, Tensor) and torch.allclose(
        result, expected, rtol=tolerance, atol=tolerance
    )


def cast_around(module: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Make a module compute in float32 within a model of another dtype.

    Its inputs are cast to float32 and its outputs back.

    Args:
        module: A module whose floating-point parameters are in float32.
        dtype: The dtype of the surrounding model.

    Returns:
        Handles whose ``remove`` undoes this.
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
    """Cast all floating-point tensors in a value, including nested ones."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def outermost_owners(names: Iterable[str]) -> list[str]:
    """Return the modules to cast around, given the names of all float32 tensors.

    A tensor's owner is the module that directly contains it. If one owner is inside another, the
    outer one suffices, since everything inside it computes in float32.
    """
    owners = {name.rpartition(".")[0] for name in names}
    outermost = []
    for owner in owners:
        if not any(owner.startswith(f"{other}.") for other in owners):
            outermost.append(owner)
    return sorted(outermost)
