"""`UpdateCollector`: validate, screen and store the updates of one round as they arrive."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.protocol.messages import Reply
    from fedmomentum.server.client_updates import UpdateReader
    from fedmomentum.server.moments import SharedOptimizer
    from fedmomentum.server.round_data import UploadedMoments
    from fedmomentum.server.screening import Screening
    from fedmomentum.server.update_store import UpdateStore


@dataclass
class UpdateCollector:
    """Takes the replies of a round's training, one at a time.

    Attributes:
        reader: Validates the updates.
        store: Keeps them on disk.
        screening: Measures how far each client moved; None if screening is off.
        optimizer: Validates the optimizer's moments; None if clients share none.
        started_moments: Hash of the moments that the round started with; None for zeros.
        updates: Client to its update, read from disk on access.
        moments: Client to the moments that it sent, read from disk on access.
    """

    reader: UpdateReader
    store: UpdateStore
    screening: Screening | None
    optimizer: SharedOptimizer | None
    started_moments: str | None
    updates: dict[str, Adapter] = field(default_factory=dict)
    moments: dict[str, UploadedMoments] = field(default_factory=dict)

    def accept(self, reply: Reply) -> None:
        """Take a reply.

        Raises:
            FedMomentumError: If it is refused; the message names client and tensor.
        """
        client = reply.client_id
        # Everything is checked before anything is kept.
        update = self.reader.read(reply)
        uploaded = None
        if self.optimizer is not None:
            uploaded = self.optimizer.read(
                reply, self.reader.model.adapter, reply.server_round, self.started_moments
            )
        if self.screening is not None:
            self.screening.add(
                client,
                update,
                lambda: self.reader.start(client),
                like=self.reader.group(client),
                num_examples=reply.num_examples,
            )
        # Keep updates on disk, so that memory does not grow with the number of clients.
        self.updates[client] = self.store.put(update)
        if uploaded is not None:
            tensors = self.store.put_tensors(uploaded.tensors)
            self.moments[client] = replace(uploaded, tensors=tensors)
