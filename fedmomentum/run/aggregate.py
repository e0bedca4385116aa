"""Aggregate PEFT adapter directories into a global model, without a run or the base model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedmomentum.aggregation.aggregate import aggregate_adapters, largest_rank
from fedmomentum.base_model.checkpoint_files import read_config
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.base_model.library_errors import translate_library_errors
from fedmomentum.base_model.skeleton import Skeleton, load_skeleton
from fedmomentum.base_model.weight_slots import WeightSlot, find_owners
from fedmomentum.errors import AdapterError, ConfigError, ModelError
from fedmomentum.global_model.base_loading import base_of_adapter, is_classifier
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.matrix import rank_bound
from fedmomentum.lora.base_names import with_base
from fedmomentum.lora.hub_adapter import find_adapter
from fedmomentum.lora.peft_config import plain_config
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.lora.peft_layout import stacks
from fedmomentum.utils.hub import split_revision

if TYPE_CHECKING:
    from fedmomentum.aggregation.method import Method
    from fedmomentum.lora.adapter import Adapter

LOG = logging.getLogger("fedmomentum")


@dataclass(frozen=True)
class AggregatedDirectories:
    """The global model made from adapter directories.

    Attributes:
        model: The global model; its base model is known by name only.
        num_adapters: How many adapters were aggregated.
        rank: The rank of the global adapter; smaller modules have their full rank.
        residual_rank: The largest rank that the base model absorbs in any module.
    """

    model: GlobalModel
    num_adapters: int
    rank: int
    residual_rank: int


def aggregate_directories(
    paths: Sequence[Path | str],
    method: Method,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    lora_alpha: float | None = None,
    base: str = "",
) -> AggregatedDirectories:
    """Aggregate adapters of one base model: `sum_i w_i s_i B_i A_i`, with weights summing to 1.

    Args:
        paths: PEFT adapter directories, or names of adapters on the hub.
        method: How to aggregate.
        weights: A positive number for each adapter; by default equal.
        rank: The rank of the result, in modules that are large enough; by default the largest rank
            of the adapters.
        lora_alpha: The numerator of the result's scaling; by default the scaling is the adapters'
            own if they share one, else 1.
        base: The base model of all adapters, whatever name they give it; from the hub also as
            `NAME@REVISION`.

    Raises:
        ConfigError: If the rank, `lora_alpha` or the weights are out of range, or `base` is the
            path of no directory.
        AdapterError: If an adapter cannot be read, the adapters do not fit together, or `base` is a
            directory and they do not fit it.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1; got {rank}")
    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        raise ConfigError(f"--lora-alpha must be a number above 0; got {lora_alpha:g}")
    base, revision = split_revision(base)
    # Messages call an adapter what the user called it, wherever its directory is.
    directories = [find_adapter(path) for path in paths]
    adapters = []
    for path, directory in zip(paths, directories, strict=True):
        adapters.append(with_base(read_adapter(directory, str(path)), base, revision or ""))
    if base and Path(base).is_dir():
        check_shapes(adapters, Path(base))
    elif base:
        _check_name(base)
    identity = _common_base(directories, adapters)
    if base:
        # The revision is the given one, or else the one that the adapters name.
        identity = replace(identity, name=base, revision=adapters[0].config.get("revision"))
    result_rank = largest_rank(adapters) if rank is None else rank
    scaling = None if lora_alpha is None else lora_alpha / result_rank
    aggregate = aggregate_adapters(adapters, weights, method, rank=rank, scaling=scaling)

    # Adapters on disk are in float32, whatever dtype the aggregation used.
    modules = {name: matrix.to(torch.float32) for name, matrix in aggregate.adapter.modules.items()}
    model = GlobalModel(
        base=identity,
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
    return AggregatedDirectories(model, len(adapters), result_rank, residual_rank)


def _check_name(base: str) -> None:
    """Refuse a base model that is a path, but of no directory; warn that a name is not checked.

    Raises:
        ConfigError: If it is.
    """
    if Path(base).exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
        what = "is no directory" if Path(base).exists() else "does not exist"
        raise ConfigError(
            f"--base {base} {what}; give the directory of the adapters' base model, or its name "
            "on the hub"
        )
    LOG.warning(
        "%s is no directory here, so whether the adapters fit it was not checked; it is taken as "
        "the name of a model on the hub",
        base,
    )


def check_shapes(adapters: Sequence[Adapter], directory: Path) -> None:
    """Refuse adapters of modules that a base model does not have, or has with another shape.

    Args:
        adapters: The adapters.
        directory: The base model's directory; its weights are not loaded.

    Raises:
        AdapterError: If there are any; the message names adapter and module.
        ModelError: If the model cannot be built.
    """
    model = _skeleton_for(adapters[0], directory).model
    for adapter in adapters:
        for module, matrix in adapter.modules.items():
            shape = _shape_in(model, module)
            if shape != matrix.shape:
                found = "does not have"
                if shape is not None:
                    found = f"has as {shape[0]} x {shape[1]}"
                raise AdapterError(
                    f"{adapter.name} adapts {module} ({matrix.shape[0]} x {matrix.shape[1]}), "
                    f"which {directory} {found}; it is of another model than --base names"
                )
        for parameter, experts in stacks(adapter.modules, adapter.name).items():
            num_experts = len(model.get_parameter(parameter))
            if num_experts != len(experts):
                raise AdapterError(
                    f"{adapter.name} adapts {len(experts)} experts of {parameter}, of which "
                    f"{directory} has {num_experts}; it is of another model than --base names"
                )


def _shape_in(model: nn.Module, name: str) -> tuple[int, int] | None:
    """Return `(out, in)` of a matrix in a base model; None if the model does not have it."""
    try:
        (owner,) = find_owners(model, [name]).values()
    except ModelError:
        return None
    slot = WeightSlot.of(name, owner)
    parameter = getattr(owner, slot.parameter, None)
    dimensions = 2 if slot.expert is None else 3
    if not isinstance(parameter, nn.Parameter) or parameter.ndim != dimensions:
        return None
    is_beyond_the_last = slot.expert is not None and slot.expert >= len(parameter)
    return None if is_beyond_the_last else slot.shape


def _skeleton_for(adapter: Adapter, directory: Path) -> Skeleton:
    """Return the base model of an adapter without its weights: a classifier or a language model.

    Raises:
        ModelError: If transformers cannot build it.
    """
    # Only the head depends on the labels, and it is no module of the base.
    labels = ("0", "1") if is_classifier(adapter) else ()
    with translate_library_errors(
        f"cannot build the model in {directory}, to check that the adapters fit it",
        read_config(directory),
    ):
        return load_skeleton(directory, labels, "auto")


def _common_base(directories: Sequence[Path], adapters: Sequence[Adapter]) -> BaseIdentity:
    """Return the base model of all adapters: the first one identified by more than its name.

    Raises:
        AdapterError: If two adapters are for different base models, or for different quantizations
            of one base model.
    """
    bases = []
    for directory, adapter in zip(directories, adapters, strict=True):
        bases.append(base_of_adapter(directory, adapter))
    known = [number for number, base in enumerate(bases) if base.sha256]
    if not known:
        return bases[0] if bases[0].name else replace(bases[0], name="unknown")
    first = known[0]
    for number in known[1:]:
        try:
            bases[first].check(bases[number])
        except ModelError as error:
            raise AdapterError(
                f"{adapters[first].name} and {adapters[number].name} do not fit together: {error}"
            ) from error
    return bases[first]
