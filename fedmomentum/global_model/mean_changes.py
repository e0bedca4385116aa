"""The outcome of a round's first sum, as an object that its clients are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedmomentum.aggregation.product_from_sums import MeanChange, MeanChanges
from fedmomentum.errors import PayloadError
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.low_rank import CORE_DTYPE
from fedmomentum.utils.io import canonical_json
from fedmomentum.utils.schema import PositiveCount, Schema, parse_json
from fedmomentum.utils.tensors import read_safetensors, safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_KEY = "means"


class _Header(Schema, frozen=True, kw_only=True):
    num_examples: PositiveCount


def means_object(means: MeanChanges) -> StoredObject:
    """Return the means of the factors and the ranges of the cross terms, in float32.

    `AdapterSums.mean_changes` has already rounded them to float32, so both sides use equal numbers.
    """
    tensors = {}
    for module, mean in means.modules.items():
        for part in ("b", "a", "Q"):
            tensors[f"{module}.{part}"] = getattr(mean, part).to(torch.float32).contiguous()
    header = canonical_json({"num_examples": means.num_examples})
    return StoredObject(safetensors_bytes(tensors, (_KEY, header)))


def read_means(stored: StoredObject, name: str) -> MeanChanges:
    """Read the means in an object, which does not include tensors trained in full.

    Args:
        stored: The object.
        name: What to call it in messages.

    Raises:
        PayloadError: If it holds anything else.
    """
    tensors, metadata = read_safetensors(stored.data, name)
    header = parse_json(str(metadata.get(_KEY, "")), _Header, name)
    modules = {}
    for key in tensors:
        module, _, part = key.rpartition(".")
        if part not in ("b", "a", "Q"):
            raise PayloadError(f"{name}: {key[:200]!r} is no part of a sum's outcome")
        if module not in modules:
            modules[module] = _mean_change(tensors, module, header.num_examples, name)
    return MeanChanges(header.num_examples, modules, {})


def _mean_change(
    tensors: Mapping[str, Tensor], module: str, num_examples: int, name: str
) -> MeanChange:
    """Return one module's means, with shapes checked against each other.

    Raises:
        PayloadError: If one is missing, or they do not fit together.
    """
    parts = {}
    for part in ("b", "a", "Q"):
        tensor = tensors.get(f"{module}.{part}")
        if tensor is None or tensor.dtype != torch.float32 or tensor.ndim != 2:
            got = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise PayloadError(f"{name}: {module}.{part} is {got}; wanted a float32 matrix")
        if not bool(torch.isfinite(tensor).all()):
            raise PayloadError(f"{name}: {module}.{part} holds NaN or Inf")
        parts[part] = tensor.to(CORE_DTYPE)
    b, a, Q = parts["b"], parts["a"], parts["Q"]
    if b.shape[1] != a.shape[0] or Q.shape[0] != b.shape[0]:
        raise PayloadError(f"{name}: the means of {module} do not fit each other")
    return MeanChange(num_examples, b, a, Q)
