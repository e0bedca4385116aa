"""The roster of nodes admitted by other software, each of which is asked once for its name."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import NamedTuple

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedmomentum.errors import ConfigError
from fedmomentum.flower.payloads import pack_payload, unpack_payload
from fedmomentum.flower.transport import Session
from fedmomentum.utils.names import check_client_name
from fedmomentum.utils.text import printable

LOG = logging.getLogger("fedmomentum")
ANSWER_SECONDS = 120.0
"""How long a node may take to return its name, for which Flower or Ray starts a process."""
REPEAT_SECONDS = 30.0
"""How long until a node that returned an error instead of its name is asked again."""
MAX_REASON = 500


class _Question(NamedTuple):
    """A request for a node's name: the message's id, and until when it is not repeated."""

    message_id: str
    end: float


class NodeRoster:
    """`Roster` over a Flower grid whose nodes have random ids, and names that only they know.

    A name is not bound to a node: it belongs to the first node that claimed it, as long as that
    node stays connected.

    Args:
        grid: Flower's grid.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._names: dict[Session, str] = {}
        self._questions: dict[Session, _Question] = {}
        self._refused: set[Session] = set()
        self._reasons: dict[Session, str] = {}  # already reported

    def registered(self) -> list[str]:
        """Return the names of all clients that have ever connected, sorted."""
        self._refresh()
        return sorted(set(self._names.values()))

    def online(self) -> dict[str, Session]:
        """Return the connected clients, sorted by name."""
        connected = self._refresh()
        by_name: dict[str, Session] = {}
        # In the order of the answers, since the first to claim a name gets it.
        for session, name in self._names.items():
            if session not in connected:
                continue
            if name not in by_name:
                by_name[name] = session
            elif session not in self._refused:
                self._refused.add(session)
                LOG.warning(
                    "node %d says that it is %s, and so does node %d, which was first; it takes no "
                    "part",
                    session.node_id,
                    name,
                    by_name[name].node_id,
                )
        return dict(sorted(by_name.items()))

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Do nothing: Flower's SuperLink does not return what it was given."""

    def discard(self, message_id: str) -> None:
        """Do nothing, for the same reason."""

    # ── asking ──

    def _refresh(self) -> set[Session]:
        """Ask new nodes, read the answers that have arrived, and return all connected nodes."""
        connected = {
            Session(node.node_id, node.last_activated_at) for node in self._grid.get_nodes()
        }
        self._read_answers(connected)
        now = time.monotonic()
        for session in sorted(connected - self._names.keys(), key=lambda one: one.node_id):
            question = self._questions.get(session)
            if question is None or now > question.end:
                self._ask(session, now)
        return connected

    def _ask(self, session: Session, now: float) -> None:
        message = Message(pack_payload(b""), session.node_id, MessageType.QUERY)
        message_ids = list(self._grid.push_messages([message]))
        message_id = message_ids[0] if message_ids else ""
        seconds = ANSWER_SECONDS if message_id else REPEAT_SECONDS
        self._questions[session] = _Question(message_id or "", now + seconds)

    def _read_answers(self, connected: set[Session]) -> None:
        for session, question in list(self._questions.items()):
            if session not in connected:
                del self._questions[session]
                continue
            if not question.message_id:
                continue
            for reply in self._grid.pull_messages([question.message_id]):
                self._read(session, reply)

    def _read(self, session: Session, reply: Message) -> None:
        """Record a node's name, or log why there is none and ask again later."""
        try:
            if reply.has_error():
                raise ConfigError(str(reply.error.reason or f"Flower's error {reply.error.code}"))
            name = unpack_payload(reply.content).payload.decode()
            check_client_name(name, "its answer")
        except (ConfigError, ValueError) as error:
            reason = printable(str(error), MAX_REASON)
            if self._reasons.get(session) != reason:
                self._reasons[session] = reason
                LOG.warning("node %d takes no part: %s", session.node_id, reason)
            self._questions[session] = _Question("", time.monotonic() + REPEAT_SECONDS)
            return
        del self._questions[session]
        self._names[session] = name
