"""What each client starts from: the global adapter at the client's rank, scaling and modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedmomentum.aggregation.method import Method
    from fedmomentum.linalg.low_rank import LowRank
    from fedmomentum.lora.adapter import Adapter


def initialize_adapter(
    method: Method, fresh: Adapter, weight: Callable[[str], Tensor] | None = None
) -> tuple[Adapter, dict[str, LowRank]]:
    """Return the adapter before round 1, and the change to the base that compensates for it.

    Args:
        method: Does the initialization; most methods keep `fresh` and leave the base unchanged.
        fresh: LoRA's own initialization.
        weight: Returns the base weight `(out, in)` of a module; called only if
            `method.reads_base`.

    Returns:
        The adapter, and by module the change to the base weight, in effective-weight units (added
        with factor 1).
    """
    modules: dict[str, LowRank] = {}
    changes: dict[str, LowRank] = {}
    for module, matrix in fresh.modules.items():
        scaling = fresh.scalings[module]
        W = None
        if weight and method.reads_base:
            W = weight(module).to(torch.float64) / scaling
        modules[module], change = method.initialize(W, matrix)
        if change is not None:
            changes[module] = change.scaled(scaling)
    return replace(fresh, modules=modules), changes


def client_adapter(
    method: Method, adapter: Adapter, ranks: Mapping[str, int], scalings: Mapping[str, float]
) -> tuple[Adapter, dict[str, LowRank]]:
    """Split the global adapter into a client's adapter, in its scaling, and the tails beyond it.

    The tails go into the client's base if `method.keeps_tail`; otherwise the client loses them.

    Args:
        method: Does the split.
        adapter: The global adapter.
        ranks: Module to the client's rank.
        scalings: Module to the client's `lora_alpha / rank`.

    Returns:
        The client's adapter, with the ratio of scalings multiplied into B, and module to its tail
        in effective-weight units.
    """
    modules: dict[str, LowRank] = {}
    tails: dict[str, LowRank] = {}
    for module, matrix in adapter.modules.items():
        scaling = adapter.scalings[module]
        head, tail = method.client_adapter(matrix, ranks[module])
        if scaling != scalings[module]:
            head = head.scaled(scaling / scalings[module])
        modules[module] = head
        if tail.rank:
            tails[module] = tail.scaled(scaling)
    return replace(adapter, modules=modules, scalings=dict(scalings)), tails


def client_start(
    method: Method,
    adapter: Adapter,
    modules: Collection[str],
    *,
    rank: int,
    scaling: float,
    is_mixed: bool,
) -> tuple[Adapter, dict[str, LowRank]]:
    """Return what a client starts from: its adapter, and the fixed residual in its base.

    The fixed residual consists of the tails, if the method has clients keep them, and of the
    global adapter in modules that the client does not adapt.

    Args:
        method: Splits the global adapter.
        adapter: The global adapter.
        modules: The modules that this client adapts.
        rank: This client's rank.
        scaling: This client's `lora_alpha / rank`.
        is_mixed: Whether the run's clients have different ranks; if so, all start in one gauge.

    Returns:
        The client's adapter, and module to its fixed residual in effective-weight units.
    """
    # For a module that the client does not adapt, the whole product is fixed.
    adapted: dict[str, LowRank] = {}
    fixed_residual: dict[str, LowRank] = {}
    for module, matrix in adapter.modules.items():
        if module in modules:
            adapted[module] = matrix
        else:
            fixed_residual[module] = adapter.effective(module).to(torch.float32)
    start = replace(adapter, modules=adapted)
    if not is_mixed:
        return _rescaled(start, scaling), fixed_residual
    # With mixed ranks, every client's adapter is split from the global one, even at full rank.
    ranks = dict.fromkeys(adapted, rank)
    scalings = dict.fromkeys(adapted, scaling)
    start, tails = client_adapter(method, start, ranks, scalings)
    if method.keeps_tail:
        fixed_residual |= tails
    return start, fixed_residual


def _rescaled(adapter: Adapter, scaling: float) -> Adapter:
    """Return the same products in another scaling; the ratio is multiplied into B."""
    modules = {}
    for module, matrix in adapter.modules.items():
        modules[module] = matrix.scaled(adapter.scalings[module] / scaling)
    return replace(adapter, modules=modules, scalings=dict.fromkeys(modules, scaling))


def with_fixed_residual(trained: Adapter, fixed_residual: Mapping[str, LowRank]) -> Adapter:
    """Return a client's whole effective product: its trained adapter plus its fixed residual.

    This is what methods receive as the client's update.
    """
    modules = dict(trained.modules)
    scalings = dict(trained.scalings)
    for module, matrix in fixed_residual.items():
        # Convert to the trained adapter's units if it has the module; else use scaling 1.
        if module in modules:
            tail = matrix.scaled(1 / scalings[module])
            modules[module] = modules[module].concatenate(tail)
        else:
            modules[module] = matrix
            scalings[module] = 1.0
    return replace(trained, modules=modules, scalings=scalings)
