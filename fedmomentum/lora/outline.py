"""The shapes of an adapter, without a loaded model to attach it to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
from fedmomentum.lora.module_names import EMBEDDING, expert_name
from fedmomentum.lora.targets import Targets


def outline_adapter(
    model: Any, targets: Targets, *, rank: int, scaling: float, saved: Collection[str]
) -> Adapter:
    """Return an adapter with the right names and shapes, on the meta device.

    Args:
        model: The base model; its tensors may have no memory.
        targets: What is adapted.
        rank: The rank of the adapter.
        scaling: Its scaling.
        saved: Paths of the fully trained modules.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for path in targets.modules:
        module = model.get_submodule(path)
        name = path + EMBEDDING if isinstance(module, nn.Embedding) else path
        out_size, in_size = module.weight.shape
        shapes[name] = (in_size, out_size) if isinstance(module, Conv1D) else (out_size, in_size)
    for path in targets.parameters:
        parameter = model.get_parameter(path)
        if parameter.ndim == 3:
            # Stored transposed or not, the number of elements is the same.
            for index in range(parameter.shape[0]):
                shapes[expert_name(path, index)] = (parameter.shape[1], parameter.shape[2])
        else:
            shapes[path.removesuffix(".weight")] = (parameter.shape[0], parameter.shape[1])

    modules = {}
    for name, (out_size, in_size) in sorted(shapes.items()):
        B = torch.empty(out_size, rank, device="meta")
        modules[name] = LowRank(B, torch.empty(rank, in_size, device="meta"))
    full: dict[str, Tensor] = {}
    for path in saved:
        for name, tensor in model.get_submodule(path).named_parameters(prefix=path):
            full[name] = torch.empty(tuple(tensor.shape), device="meta")
    return Adapter(modules, dict.fromkeys(modules, scaling), saved=full, name="planned adapter")
