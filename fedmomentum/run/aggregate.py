"""Aggregate PEFT adapter directories into a global model, without a run or the base model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmomentum.aggregation.aggregate import aggregate_adapters
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.errors import ConfigError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.matrix import rank_bound
from fedmomentum.lora.peft_config import plain_config
from fedmomentum.lora.peft_folder import read_adapter

if TYPE_CHECKING:
    from fedmomentum.aggregation.method import Method


@dataclass(frozen=True)
class AggregatedDirectories:
    """The global model made of adapter directories.

    Attributes:
        model: The global model; its base model is known by name only.
        num_adapters: How many adapters were aggregated.
        rank: The rank of the global adapter.
        residual_rank: The largest rank of what the base model absorbs in a module.
    """

    model: GlobalModel
    num_adapters: int
    rank: int
    residual_rank: int


def aggregate_directories(
    directories: Sequence[Path],
    method: Method,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    lora_alpha: float | None = None,
) -> AggregatedDirectories:
    """Aggregate adapters of one base model: `sum_i w_i s_i B_i A_i`, with the weights' sum 1.

    Args:
        directories: PEFT adapter directories.
        method: How to aggregate.
        weights: A positive number for each adapter; by default equal.
        rank: The rank of the result; by default the largest rank of the adapters.
        lora_alpha: The numerator of the result's scaling; by default the scaling is the adapters'
            own if they share one, else 1.

    Raises:
        ConfigError: If the rank, `lora_alpha` or the weights are out of range.
        AdapterError: If an adapter cannot be read, or the adapters do not fit together.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1; got {rank}")
    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        raise ConfigError(f"--lora-alpha must be a number above 0; got {lora_alpha:g}")
    adapters = [read_adapter(directory) for directory in directories]
    if rank is None:
        rank = max(matrix.rank for adapter in adapters for matrix in adapter.modules.values())
    scaling = None if lora_alpha is None else lora_alpha / rank
    aggregate = aggregate_adapters(adapters, weights, method, rank=rank, scaling=scaling)

    # adapters on disk are in float32, whatever the aggregation computed in
    modules = {name: matrix.to(torch.float32) for name, matrix in aggregate.adapter.modules.items()}
    base_config = adapters[0].config
    base_name = str(base_config.get("base_model_name_or_path") or "unknown")
    model = GlobalModel(
        base=BaseIdentity(base_name, base_config.get("revision")),
        adapter=replace(
            aggregate.adapter,
            modules=modules,
            config=plain_config(aggregate.adapter),
            name="aggregate",
        ),
        base_update=(StoredObject.of(aggregate.residual),) if aggregate.residual else (),
        carried=aggregate.carried,
        server_round=1,
        method=repr(method),
    )
    residual_rank = max(map(rank_bound, aggregate.residual.values()), default=0)
    return AggregatedDirectories(model, len(adapters), rank, residual_rank)
