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
from fedmomentum.base_model.skeleton import load_skeleton
from fedmomentum.errors import AdapterError, ConfigError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.matrix import rank_bound
from fedmomentum.lora.base_names import with_base
from fedmomentum.lora.module_names import EMBEDDING, split_expert
from fedmomentum.lora.peft_config import plain_config
from fedmomentum.lora.peft_folder import read_adapter

if TYPE_CHECKING:
    from fedmomentum.aggregation.method import Method
    from fedmomentum.lora.adapter import Adapter


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
    base: str = "",
    revision: str = "",
) -> AggregatedDirectories:
    """Aggregate adapters of one base model: `sum_i w_i s_i B_i A_i`, with the weights' sum 1.

    Args:
        directories: PEFT adapter directories.
        method: How to aggregate.
        weights: A positive number for each adapter; by default equal.
        rank: The rank of the result; by default the largest rank of the adapters.
        lora_alpha: The numerator of the result's scaling; by default the scaling is the adapters'
            own if they share one, else 1.
        base: The one base model of all adapters, whatever they call it.
        revision: Its revision, whatever the adapters name.

    Raises:
        ConfigError: If the rank, `lora_alpha` or the weights are out of range.
        AdapterError: If an adapter cannot be read, the adapters do not fit together, or they do
            not fit `base`, where that is a directory.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1; got {rank}")
    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        raise ConfigError(f"--lora-alpha must be a number above 0; got {lora_alpha:g}")
    adapters = []
    for directory in directories:
        adapters.append(with_base(read_adapter(directory), base, revision))
    if base and Path(base).is_dir():
        check_shapes(adapters, Path(base))
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


def check_shapes(adapters: Sequence[Adapter], directory: Path) -> None:
    """Refuse adapters of modules that a base model does not have, or has in another size.

    Args:
        adapters: The adapters.
        directory: The base model's directory; its weights are not loaded.

    Raises:
        AdapterError: If there are any; the message names adapter and module.
    """
    sizes = {}
    for name, parameter in load_skeleton(directory, (), "auto").model.named_parameters():
        if parameter.ndim == 2:
            sizes[name.removesuffix(".weight")] = sorted(parameter.shape)
    for adapter in adapters:
        for module, matrix in adapter.modules.items():
            # Experts share one parameter with others, and embeddings have names of their own.
            _, index = split_expert(module)
            if index is not None or module.endswith(EMBEDDING):
                continue
            if sizes.get(module) != sorted(matrix.shape):
                found = "does not have" if module not in sizes else "has in another size"
                raise AdapterError(
                    f"{adapter.name} adapts {module} ({matrix.shape[0]} x {matrix.shape[1]}), "
                    f"which {directory} {found}; it is of another model than --base names"
                )
