"""Which parts of the global model each client is sent, and when its base update is consolidated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedmomentum.global_model.consolidation import (
    Delivery,
    consolidate,
    dense_bytes,
    plan_delivery,
    prune_recipes,
    should_consolidate,
)

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.server.checkpoint import RunDirectory
    from fedmomentum.server.state import ServerState


def plan_deliveries(
    model: GlobalModel, state: ServerState, clients: Sequence[str], directory: RunDirectory
) -> dict[str, Delivery]:
    """Return what each client needs for the model's base, given what it last reported having."""
    names = [stored.name for stored in model.base_update]
    size_of = _size_of(model, directory)
    plans = {}
    for client in clients:
        cached_objects = state.held.get(client, ())
        plans[client] = plan_delivery(names, cached_objects, state.recipes, size_of)
    return plans


def consolidate_if_due(
    model: GlobalModel, state: ServerState, clients: Sequence[str], directory: RunDirectory
) -> tuple[GlobalModel, ServerState]:
    """Merge the model's base update into one snapshot if clients would download too much.

    The decision depends only on the saved model and state and on `clients`, so that it is the same
    after a kill.

    Args:
        model: The global model.
        state: What the server remembers.
        clients: The clients that are asked next.
        directory: The run's directory.
    """
    plans = plan_deliveries(model, state, clients, directory)
    if not should_consolidate(model, [plan.size for plan in plans.values()]):
        return model, state
    next_model, recipe, ties = consolidate(model)
    # Recipes' objects are read from the directory, which lacks only those of this round.
    new_objects = {stored.name: stored.data for stored in model.newest}
    directory.put({ties.name: ties.data, **new_objects})
    recipes = prune_recipes(
        (*state.recipes, recipe), _size_of(model, directory), dense_bytes(model)
    )
    return next_model, replace(state, recipes=recipes)


def _size_of(model: GlobalModel, directory: RunDirectory) -> Callable[[str], int]:
    """Return a function from hash to size in bytes, for the parts of the model and of recipes."""
    sizes = {stored.name: len(stored.data) for stored in model.base_update}

    def size_of(name: str) -> int:
        return sizes[name] if name in sizes else directory.size(name)

    return size_of
