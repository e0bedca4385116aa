"""Outputs of a live layer's forward for probe vectors, before they are rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedmomentum.base_model.weight_slots import WeightSlot

# Number of embedding rows looked up at a time.
CHUNK_ROWS = 4096


def layer_outputs(slot: WeightSlot, X: Tensor) -> Tensor:
    """Return `W X` `(out, n)` as the layer's forward computes it, including its bias.

    Hooks that round outputs to the surrounding model's dtype run afterward. So this measures what
    the forward does with the weight: any rounding of weights or inputs, such as TF32, shows up.

    Args:
        slot: The place of the matrix. For an embedding, all rows are looked up and multiplied by X.
            An expert has no forward of its own; its weight is multiplied directly.
        X: `(in, n)`, on the layer's device.
    """
    if slot.expert is not None:
        weight = slot.matrix(slot.live)
        return weight @ X.to(weight.dtype)
    if isinstance(slot.owner, nn.Embedding):
        rows = []
        for ids in torch.arange(slot.shape[0], device=X.device).split(CHUNK_ROWS):
            looked_up = _unrounded(slot.owner, ids)
            rows.append(looked_up @ X.to(looked_up.dtype))
        return torch.cat(rows)
    return _unrounded(slot.owner, X.mT).mT


def outputs_with(slot: WeightSlot, weight: Tensor, X: Tensor) -> Tensor:
    """Return what `layer_outputs` returns with another weight `(out, in)` in this place."""
    live = slot.live
    other = weight.to(device=live.device, dtype=live.dtype)
    if slot.expert is not None:
        return other @ X.to(other.dtype)
    parameter = getattr(slot.owner, slot.parameter)
    other = other.mT if slot.is_transposed else other
    setattr(slot.owner, slot.parameter, nn.Parameter(other, requires_grad=False))
    try:
        return layer_outputs(slot, X)
    finally:
        setattr(slot.owner, slot.parameter, parameter)


def _unrounded(layer: Any, inputs: Tensor) -> Tensor:
    """Call a layer, and return its forward's output before other hooks change it."""
    results: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        results.append(output.detach())

    handle = layer.register_forward_hook(keep, prepend=True)
    try:
        with torch.no_grad():
            layer(inputs)
    finally:
        handle.remove()
    return results[0]
