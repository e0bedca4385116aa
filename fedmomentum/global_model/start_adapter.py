"""Starting a run from an existing adapter: `lora.start-from`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fedmomentum.errors import AdapterError
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.global_model.parts import ADAPTER_TITLE, rounding_losses
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import check_size
from fedmomentum.lora.half_precision import roundtrip

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.lora.adapter import Adapter


def add_start_adapter(
    model: GlobalModel, start_adapter: Adapter, *, is_merged: bool, is_mixed: bool
) -> GlobalModel:
    """Return the model of round 0 with the whole product of an adapter added to it.

    An adapter of the run's rank is continued as it is. One of lower rank is padded with the last
    rows of the fresh adapter's A, and zeros in B. One of higher rank is continued in its leading
    directions, and the others are merged into the base.

    Args:
        model: The base model with the adapter that the method starts from.
        start_adapter: The adapter to begin with.
        is_merged: Whether all of it is merged into the base, because the method starts from its own
            adapter.
        is_mixed: Whether clients have different ranks. Those of lower rank take the first
            components, so the adapter's are then its singular directions, in descending order.

    Raises:
        AdapterError: If the adapter changes modules that the run does not adapt, or shapes differ.
    """
    check_fits(model.adapter, start_adapter)
    check_size(start_adapter)
    modules = dict(model.adapter.modules)
    changes: dict[str, LowRank] = {}
    for module, matrix in start_adapter.modules.items():
        fresh = modules[module]
        if is_merged:
            tail = matrix
        else:
            head, tail = _divide(matrix, fresh, is_ordered=is_mixed)
            ratio = start_adapter.scalings[module] / model.adapter.scalings[module]
            modules[module] = head.to(torch.float64).scaled(ratio).to(torch.float32)
        if tail.rank:
            scaled = tail.to(torch.float64).scaled(start_adapter.scalings[module])
            changes[module] = scaled.to(torch.float32)
    saved = {
        key: start_adapter.saved.get(key, tensor).to(tensor.dtype)
        for key, tensor in model.adapter.saved.items()
    }
    adapter = replace(model.adapter, modules=modules, saved=saved, name=ADAPTER_TITLE)

    # If factors are sent in 16 bits, merge what rounding removes into the base.
    rounded = roundtrip(adapter, model.adapter_dtype)
    if rounded is not adapter:
        for module, lost in rounding_losses(adapter, rounded).items():
            part = lost.to(torch.float32)
            changes[module] = changes[module].concatenate(part) if module in changes else part
    update = (StoredObject.of(changes),) if changes else ()
    return replace(model, adapter=rounded, base_update=(*model.base_update, *update))


def _divide(matrix: LowRank, fresh: LowRank, *, is_ordered: bool) -> tuple[LowRank, LowRank]:
    """Return factors with the rank of `fresh`, and the rest, of rank 0 if there is none.

    Args:
        matrix: The factors of the adapter to start from.
        fresh: The factors of a new adapter.
        is_ordered: Whether the components must be singular directions, in descending order.
    """
    missing = fresh.rank - matrix.rank
    if is_ordered or missing < 0:
        matrix = matrix.to(torch.float64).canonical()
    if missing > 0:
        spare = LowRank(fresh.B.new_zeros(fresh.shape[0], missing), fresh.A[-missing:])
        matrix = matrix.concatenate(spare.to(matrix.dtype))
    return matrix.split_rank(fresh.rank)


def check_fits(own_adapter: Adapter, start_adapter: Adapter) -> None:
    """Refuse an adapter that does not fit the run's modules.

    Args:
        own_adapter: The run's adapter; its tensors need not have values.
        start_adapter: The adapter to begin with.

    Raises:
        AdapterError: If it adapts another module, or one of another shape.
    """
    where = start_adapter.name
    for module, matrix in start_adapter.modules.items():
        own = own_adapter.modules.get(module)
        if own is None:
            raise AdapterError(
                f"{where} adapts {module}, which this run does not; name it in lora.target-modules "
                "or lora.target-parameters"
            )
        if own.shape != matrix.shape:
            raise AdapterError(
                f"{where}: {module} is {matrix.shape[0]} x {matrix.shape[1]}, and "
                f"{own.shape[0]} x {own.shape[1]} in the base model; it is of another model"
            )
    for key, tensor in start_adapter.saved.items():
        saved = own_adapter.saved.get(key)
        if saved is None or saved.shape != tensor.shape:
            shape = "not trained" if saved is None else f"{tuple(saved.shape)}"
            raise AdapterError(
                f"{where} holds {key} {tuple(tensor.shape)}, trained in full; in this run it is "
                f"{shape}. Name its module in lora.modules-to-save"
            )
