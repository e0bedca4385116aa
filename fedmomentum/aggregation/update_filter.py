"""`UpdateFilter`: a hook on every update, at the client and at the server.

Clipping, noise and masking are filters. None is built in, and by default none is applied.
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
    """Change updates before they leave a client, and their aggregate before it becomes the model.

    Both hooks of one filter belong together, such as masks and their removal. A hook that has
    nothing to do returns what it was given.
    """

    def on_client(self, update: ClientUpdate) -> Adapter:
        """Return the adapter that leaves the client, of the form of `update.trained`.

        It is called after training and before encoding. The client's live model is not changed.
        """
        ...

    def on_server(self, aggregate: AggregationResult, server_round: int) -> AggregationResult:
        """Return the aggregate that the next global model is made of."""
        ...
