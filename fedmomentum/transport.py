"""Transports: what carries encoded tasks to clients and their encoded replies back; and the one within one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedmomentum.errors import FedMomentumError
from fedmomentum.schema import printable

LOG = logging.getLogger("fedmomentum")


@dataclass(frozen=True)
class Failure:
    """No usable answer, and why."""

    reason: str


class Transport(Protocol):
    """Carries encoded tasks to clients and their encoded replies back."""

    max_payload_bytes: int
    """The largest payload it carries to one client."""

    def clients(self) -> Sequence[str]:
        """Everyone who can be asked now, sorted.

        Raises:
            QuorumError: too few, and waiting for more has a limit that has passed.
        """
        ...

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Ask, wait, and yield an answer or a failure for every client asked, in the order in which they come.

        Both ways are made for many clients: `tasks` may encode a payload when it is looked up, and whoever reads the
        answers is done with one before the next is handed over. So neither side need hold more than one.
        """
        ...


class InProcessTransport:
    """Clients in this process, one after the other, each a function from bytes to bytes."""

    max_payload_bytes = 2**63

    def __init__(self, clients: Mapping[str, Callable[[bytes], bytes]]) -> None:
        self._clients = dict(sorted(clients.items()))

    def clients(self) -> Sequence[str]:
        """The clients' names, sorted."""
        return list(self._clients)

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Run the clients in the order of their names; what one raises is its failure."""
        for client_id in sorted(tasks):
            yield client_id, self._answer(client_id, tasks)

    def _answer(self, client_id: str, tasks: Mapping[str, bytes]) -> bytes | Failure:
        if client_id not in self._clients:
            return Failure("missing: no such client is connected")
        payload = tasks[client_id]
        try:
            return self._clients[client_id](payload)
        except Exception as error:  # whatever a client does, the round goes on without it
            if not isinstance(error, FedMomentumError):
                LOG.debug("client %s failed", client_id, exc_info=error)
            return Failure(printable(f"{type(error).__name__}: {error}"))
