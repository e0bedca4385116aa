"""Quantized linear layers of a live model: detection, shapes and dequantization.

bitsandbytes layers and torchao weights are recognized by type name, so that neither library is
imported unless a model uses it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

# bitsandbytes' linear layers, by weight type.
_FOUR_BITS = "Linear4bit"
_EIGHT_BITS = "Linear8bitLt"


def is_four_bit(layer: Any) -> bool:
    """Return whether a layer is a bitsandbytes linear layer with 4-bit weights."""
    return _is_bitsandbytes(layer, _FOUR_BITS)


def is_eight_bit(layer: Any) -> bool:
    """Return whether a layer is a bitsandbytes linear layer with int8 weights."""
    return _is_bitsandbytes(layer, _EIGHT_BITS)


def _is_bitsandbytes(layer: Any, name: str) -> bool:
    kind = type(layer)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__ == name


def is_torchao(layer: Any) -> bool:
    """Return whether a layer is linear with a weight quantized by torchao."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, nn.Linear) and type(weight).__module__.startswith("torchao.")


def is_quantized(layer: Any) -> bool:
    """Return whether a layer is linear with quantized weights."""
    return is_four_bit(layer) or is_eight_bit(layer) or is_torchao(layer)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the quantized linear layers of a model with their paths."""
    for path, module in model.named_modules():
        if is_quantized(module):
            yield path, module


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the logical shape of a layer's weight; packed 4-bit weights differ in memory.

    Quantized weights are `(out, in)`.
    """
    if is_quantized(layer):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, counting packed ones by their logical shape."""
    packed = {id(layer.weight): layer for _, layer in quantized_layers(model)}
    total = 0
    for parameter in model.parameters():
        layer = packed.get(id(parameter))
        total += parameter.numel() if layer is None else layer.out_features * layer.in_features
    return total


def set_product_dtype(layer: Any, dtype: torch.dtype) -> None:
    """Record the dtype of a quantized layer's products on the layer; not all layers store it."""
    layer.product_dtype = dtype


def product_dtype(layer: Any) -> torch.dtype:
    """Return the dtype of a quantized layer's products; float32 if it was not recorded."""
    dtype: torch.dtype = getattr(layer, "product_dtype", torch.float32)
    return dtype


def dequantize(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a quantized layer's dequantized weight, `(out, in)`, in `dtype`, on its device.

    In float32, it is the product of codes and scales, whatever dtype the layer computes in.
    """
    if is_torchao(layer):
        weight: Tensor = layer.weight.dequantize(dtype)
        return weight
    from bitsandbytes import functional

    if is_four_bit(layer):
        # The state determines the result's dtype; leave the layer's own state unchanged.
        state = copy.copy(layer.weight.quant_state)
        state.dtype = dtype
        four_bit: Tensor = functional.dequantize_4bit(layer.weight.data, state)
        return four_bit
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    eight_bit: Tensor = functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return eight_bit.to(dtype)


def shared_with_copies(model: nn.Module) -> Iterator[Any]:
    """Yield what copies of a model share besides parameters: bitsandbytes' codes and scales.

    They are attributes of the layers, which a deep copy would duplicate.
    """
    for _, layer in quantized_layers(model):
        if is_four_bit(layer):
            yield layer.weight.quant_state
        elif is_eight_bit(layer):
            yield from (layer.state.CB, layer.state.SCB)


def import_bitsandbytes() -> None:
    """Import bitsandbytes, where PEFT would anyway, so that it runs no code from the Hub.

    On CPUs with AVX512-BF16, its import would make the `kernels` package, if installed, download
    and load a compiled extension. It works without.
    """
    is_safe = find_spec("kernels") is None or "bitsandbytes" in sys.modules
    if is_safe or find_spec("bitsandbytes") is None:
        return
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
