"""`UpdateFilter`: hooks on every update, at the client and at the server.

Clipping, noise and masking can be written as filters. None is built in or applied by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fedmomentum.aggregation.aggregate import AggregationResult
    from fedmomentum.lora.adapter import Adapter


@dataclass(frozen=True)
class ClientUpdate:
    """What one client trained in one round, before it is encoded.

    Attributes:
        client_id: The client.
        server_round: The round.
        start: The adapter that the client started from.
        trained: The adapter after training, in float32.
    """

    client_id: str
    server_round: int
    start: Adapter
    trained: Adapter


class UpdateFilter(Protocol):
    """Hooks that change updates before upload, and the aggregate before it becomes the model.

    The two hooks of a filter belong together, such as masking and unmasking. A hook that has
    nothing to do returns its input.
    """

    def on_client(self, update: ClientUpdate) -> Adapter:
        """Return the adapter that leaves the client, with the same layout as `update.trained`.

        Called after training and before encoding. The client's live model does not change.
        """
        ...

    def on_server(self, aggregate: AggregationResult, server_round: int) -> AggregationResult:
        """Return the aggregate from which the next global model is made."""
        ...
