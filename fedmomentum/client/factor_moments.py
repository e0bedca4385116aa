"""Conversion of optimizer moments between factors, for the algebra, and parameters, for trainers.

Most parameters are a single factor. The experts of a 3-D parameter share two parameters, so their
moments are slices of the same tensors, with the same step count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.aggregation.moments import Moments

if TYPE_CHECKING:
    from fedmomentum.client.local_model import LocalModel
    from fedmomentum.training.function import TrainReport


def moments_by_parameter(
    moments: Mapping[str, Moments] | None, names: Mapping[str, str], model: LocalModel
) -> dict[str, Moments] | None:
    """Return the moments by the names of the trained parameters that hold the factors.

    If only some experts of a parameter have moments, the others start with zeros.

    Args:
        moments: `<module>.<kind>` to moments; None if moments are not used.
        names: `<module>.<kind>` to the parameter's name, for the trained factors.
        model: The model that is trained.
    """
    if moments is None:
        return None
    parameters = model.trained_parameters(names)
    result: dict[str, Moments] = {}
    for key, name in names.items():
        if key not in moments:
            continue
        value = moments[key]
        if name not in result:
            result[name] = Moments(
                _zeros(parameters[name]),
                None if value.second is None else _zeros(parameters[name]),
                value.step,
            )
        stacked = result[name]
        model.view(key, stacked.first).copy_(value.first)
        if value.second is not None and stacked.second is not None:
            model.view(key, stacked.second).copy_(value.second)
    return result


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)


def moments_by_factor(
    report: TrainReport, names: Mapping[str, str], model: LocalModel
) -> dict[str, Moments]:
    """Return a report's moments by `<module>.<kind>`; empty if it has none.

    Factors that never had a gradient get zero moments.
    """
    if not report.moments:
        return {}
    example = next(iter(report.moments.values()))
    parameters = model.trained_parameters(names)
    moments = {}
    for key, name in names.items():
        value = report.moments.get(name)
        if value is None:
            # Two tensors: they are saved, and safetensors refuses those that share memory.
            first = _zeros(parameters[name])
            second = None if example.second is None else _zeros(parameters[name])
            value = Moments(first, second, example.step)
        second = None
        if value.second is not None:
            second = model.view(key, value.second).contiguous()
        moments[key] = Moments(model.view(key, value.first).contiguous(), second, value.step)
    return moments
