"""Transports, which carry encoded tasks to clients and replies back; one works in-process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedmomentum.errors import FedMomentumError, failure_text
from fedmomentum.utils.text import printable

LOG = logging.getLogger("fedmomentum")


@dataclass(frozen=True)
class Failure:
    """No usable reply, and the reason."""

    reason: str


class Transport(Protocol):
    """Carries encoded tasks to clients and their encoded replies back."""

    max_payload_bytes: int
    """The largest payload to one client."""

    def clients(self) -> Sequence[str]:
        """Return the connected clients, sorted.

        Raises:
            QuorumError: If there are still too few after waiting.
        """
        ...

    def connected(self) -> Sequence[str]:
        """Return the connected clients, sorted, however few they are and without waiting."""
        ...

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Send all tasks, and yield a reply or a failure for each client, in order of arrival.

        This scales to many clients: `tasks` may encode payloads on access, and the caller finishes
        with a reply before the next is yielded, so neither side needs memory for more than one
        payload.
        """
        ...


class InProcessTransport:
    """Runs clients in this process, one after the other; each is a function from bytes to bytes."""

    max_payload_bytes = 2**63

    def __init__(self, clients: Mapping[str, Callable[[bytes], bytes]]) -> None:
        self._clients = dict(sorted(clients.items()))

    def clients(self) -> Sequence[str]:
        """Return the clients' names, sorted."""
        return list(self._clients)

    def connected(self) -> Sequence[str]:
        """Return the clients' names, sorted."""
        return list(self._clients)

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Run the clients, sorted by name; an exception counts as the client's failure."""
        for client_id in sorted(tasks):
            yield client_id, self._reply(client_id, tasks)

    def _reply(self, client_id: str, tasks: Mapping[str, bytes]) -> bytes | Failure:
        if client_id not in self._clients:
            return Failure("missing: no such client is connected")
        payload = tasks[client_id]
        try:
            return self._clients[client_id](payload)
        except Exception as error:  # the round continues without this client
            if not isinstance(error, FedMomentumError):
                LOG.debug("client %s failed", client_id, exc_info=error)
            return Failure(printable(failure_text(error)))
