"""What the server remembers between rounds, besides the global model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmomentum.formats.manifest import Recipe, RoundOutcome
    from fedmomentum.global_model.model import GlobalModel


@dataclass(frozen=True)
class ServerState:
    """What the server remembers between rounds, besides the global model.

    Attributes:
        run_id: Names the run on the wire.
        held: Client to the hashes of the objects that it has reported having.
        best_round: The evaluated round with the lowest loss on the examples that all evaluations
            share; -1 if none.
        best_loss: Its loss.
        started_from: Hashes of the adapter objects that the last round started from; empty before
            the first. With `merged` and the current adapter, they give that round's change, to
            which the next round's is compared.
        merged: Hashes of what the last round merged into the base.
        ranks: Client to the rank at which it continues; only for methods that prune, and clients
            that have trained.
        recipes: How the last snapshots were made, oldest first, so that clients can rebuild them.
        splits: Client to the hash of how its examples are divided, as it last reported.
        moments: Hash of the optimizer's moments that the next round starts with; None where there
            are none.
        outcomes: With secure aggregation, client to the outcome of its last sums, which it learns
            with its next task.
        summed_examples: The number of examples in the last masked sum of updates; 0 before the
            first.
    """

    run_id: str
    held: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    best_round: int = -1
    best_loss: float | None = None
    started_from: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    recipes: tuple[Recipe, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)
    moments: str | None = None
    outcomes: Mapping[str, RoundOutcome] = field(default_factory=dict)
    summed_examples: int = 0

    def with_split(self, client_id: str, split: str) -> ServerState:
        """Return the state after a client reported the hash of its train/test split."""
        return replace(self, splits={**self.splits, client_id: split})

    def with_cached_objects(self, client_id: str, names: tuple[str, ...]) -> ServerState:
        """Return the state after a client reported which objects it has cached."""
        return replace(self, held={**self.held, client_id: tuple(sorted(names))})

    def after_round(self, before: GlobalModel, after: GlobalModel) -> ServerState:
        """Return the state after a round that turned the model `before` into the model `after`."""
        started_from = tuple(blob.name for blob in before.adapter_objects.values())
        return replace(
            self, started_from=started_from, merged=tuple(blob.name for blob in after.newest)
        )
