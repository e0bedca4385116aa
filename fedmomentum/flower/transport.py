"""The Flower transport: sends encoded tasks to nodes and receives replies, over any `Grid`.

Flower itself waits indefinitely for nodes, silently omits hanging nodes from its answers, and names
the wrong node in its own errors. So here every wait has a deadline, and replies are matched with
what was sent, message by message.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from flwr.app import DEFAULT_TTL, Message, MessageType
from flwr.serverapp import Grid

from fedmomentum.errors import QuorumError
from fedmomentum.flower.payloads import MAX_PAYLOAD_BYTES, pack_payload, read_reply
from fedmomentum.protocol.transport import Failure
from fedmomentum.server.callbacks import Callback
from fedmomentum.utils.text import printable

LOG = logging.getLogger("fedmomentum")
MAX_REASON = 500
"""The most characters of a client's error message."""
POLL_SECONDS = 0.2
"""How often to poll for replies."""
CHECK_SECONDS = 2.0
"""How often to check which nodes are connected."""
RECONNECT_GRACE_SECONDS = 30.0
"""How long a round that has all other replies waits for a client that lost its connection."""
MIN_TASK_SECONDS = 1.0
"""The minimum time that a client gets, even if the round is about to end."""


@dataclass(frozen=True)
class Session:
    """One connection of a node; after a reconnect or restart, `connected_at` differs."""

    node_id: int
    connected_at: str


class Roster(Protocol):
    """Which nodes may take part, and which are connected."""

    def registered(self) -> Sequence[str]:
        """Return the names of all nodes that may take part, sorted."""
        ...

    def online(self) -> Mapping[str, Session]:
        """Return the connected nodes by name."""
        ...

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Take back those of the messages that nobody has fetched yet."""
        ...

    def discard(self, message_id: str) -> None:
        """Delete a message and whatever has arrived in reply to it."""
        ...


# ── the transport ──


@dataclass
class _PendingTask:
    """A client's task without a reply so far.

    Attributes:
        message_id: The message it was sent in; None if the client was not connected, or the message
            was abandoned.
        session: The client's connection at that time, if it was connected.
        disconnected_at: When the client was first missing; None while it is connected.
    """

    message_id: str | None = None
    session: Session | None = None
    disconnected_at: float | None = None

    def may_be_answered(self) -> bool:
        if self.disconnected_at is None:
            return True
        return time.monotonic() < self.disconnected_at + RECONNECT_GRACE_SECONDS


class _ExpiredTask(NamedTuple):
    """A task whose reply will be ignored: its client and its deadline."""

    client: str
    expired_at: float


class _RoundTrip(NamedTuple):
    """One exchange: tasks by client, when it ends, and unanswered tasks by client."""

    tasks: Mapping[str, bytes]
    end: float
    pending: dict[str, _PendingTask]


class FlowerTransport:
    """`Transport` over a Flower `Grid`.

    Args:
        grid: Flower's grid, or the SuperLink's.
        roster: The names and connections of the nodes.
        round_timeout: How many seconds clients have for one answer.
        join_timeout: How many seconds to wait for nodes.
        start_timeout: How many of these seconds to wait for all nodes at the start once enough are
            connected; by default, `join_timeout`.
        min_valid_fraction: The fraction of the registered nodes needed for a round to begin.
        num_clients: The minimum number of clients, for rosters that only know clients that have
            connected.
        callback: Receives what is sent and received, and which nodes are connected.
    """

    max_payload_bytes = MAX_PAYLOAD_BYTES

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        *,
        round_timeout: float,
        join_timeout: float,
        min_valid_fraction: float,
        start_timeout: float | None = None,
        num_clients: int = 0,
        callback: Callback | None = None,
    ) -> None:
        self._grid = grid
        self._roster = roster
        self._callback = callback or Callback()
        self._round_timeout = round_timeout
        self._join_timeout = join_timeout
        self._min_valid_fraction = min_valid_fraction
        self._num_clients = num_clients
        self._start_timeout = join_timeout
        if start_timeout is not None:
            self._start_timeout = min(start_timeout, join_timeout)
        self._has_started = False
        self._expired: dict[str, _ExpiredTask] = {}  # by message
        self._missing_since: dict[str, float] = {}

    def clients(self) -> Sequence[str]:
        """Return the connected clients, sorted.

        At the start, waits a while for all of them; in a round, waits up to `join_timeout` for the
        minimum.

        Raises:
            QuorumError: If fewer than the minimum are connected after that time.
        """
        started = time.monotonic()
        end = started + self._join_timeout
        start_end = started + self._start_timeout
        while True:
            registered = self._roster.registered()
            online = sorted(self._online(registered))
            # how many are needed now: all of them while starting, then the minimum
            # 1e-9 compensates for rounding of fractions such as 0.1 * 30
            num_clients = max(self._num_clients, len(registered))
            min_clients = max(1, math.ceil(self._min_valid_fraction * num_clients - 1e-9))
            waits_for_all = not self._has_started and time.monotonic() < start_end
            num_wanted = max(1, num_clients) if waits_for_all else min_clients
            missing = sorted(set(registered) - set(online))
            if num_clients > len(registered):
                missing.append(f"{num_clients - len(registered)} that have not joined")
            self._callback.on_nodes(registered, online)
            # return if there are enough, fail if it is too late, or wait
            if len(online) >= num_wanted:
                break
            if time.monotonic() >= end:
                raise QuorumError(
                    f"{len(online)} of {num_clients} registered clients are connected after "
                    f"{self._join_timeout:g} s, and {min_clients} are needed "
                    "(federation.min-valid-fraction). Missing: "
                    f"{', '.join(missing) or 'none is registered'}. Start them and resume"
                )
            has_enough = len(online) >= min_clients
            wait_end = start_end if waits_for_all and has_enough else end
            self._callback.on_waiting(missing, wait_end - time.monotonic())
            time.sleep(CHECK_SECONDS)
        if missing and not self._has_started:
            LOG.warning("starting without %s", ", ".join(missing))
        self._has_started = True
        return online

    def connected(self) -> Sequence[str]:
        """Return the connected clients, sorted, however few they are and without waiting."""
        return sorted(self._online(self._roster.registered()))

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Send all tasks, and yield each client's reply or failure within `round_timeout`.

        A client that is not connected, or loses its connection, is sent its task when it returns
        within that time, but once all other replies are in, the round waits for it only until it
        has been missing for `RECONNECT_GRACE_SECONDS`. Replies are fetched one at a time.
        """
        online = self._online(tasks)
        round_trip = _RoundTrip(tasks, time.monotonic() + self._round_timeout, {})
        pending = round_trip.pending
        # send to all connected clients
        for client in tasks:
            if client not in online:
                pending[client] = _PendingTask(disconnected_at=self._missing_since[client])
                continue
            failure = self._push(client, online[client], round_trip)
            if failure is not None:
                yield client, failure

        # collect replies until all are there, the round is over, or only lost clients are missing
        checked_at = time.monotonic()
        while time.monotonic() < round_trip.end:
            if not any(task.may_be_answered() for task in pending.values()):
                break
            yield from self._collect(pending)
            if time.monotonic() > checked_at + CHECK_SECONDS:
                checked_at = time.monotonic()
                yield from self._resend(round_trip)
            time.sleep(POLL_SECONDS)
        # what arrived in time counts, even if the caller was busy with another reply until now
        yield from self._collect(pending)
        # what is still missing is a failure
        yield from self._give_up(pending)

    def _online(self, clients: Iterable[str]) -> Mapping[str, Session]:
        """Return the connected clients, and record since when any of the given ones are missing."""
        online = self._roster.online()
        now = time.monotonic()
        for client in clients:
            if client in online:
                self._missing_since.pop(client, None)
            else:
                self._missing_since.setdefault(client, now)
        return online

    def _push(self, client: str, session: Session, round_trip: _RoundTrip) -> Failure | None:
        """Send a client its task; return a failure if Flower does not accept it."""
        timeout = max(MIN_TASK_SECONDS, round_trip.end - time.monotonic())
        payload = round_trip.tasks[client]
        message = Message(
            pack_payload(payload, timeout),
            session.node_id,
            MessageType.TRAIN,
            ttl=max(float(DEFAULT_TTL), 2 * self._round_timeout),
        )
        try:
            (message_id,) = self._grid.push_messages([message])
        except Exception as error:
            reason = f"the message could not be sent: {type(error).__name__}: {error}"
            return self._fail(client, reason)
        if not message_id:
            return self._fail(client, "Flower did not take the message")
        round_trip.pending[client] = _PendingTask(message_id, session)
        self._callback.on_task_sent(client, len(payload), timeout)
        return None

    def _collect(self, pending: dict[str, _PendingTask]) -> Iterator[tuple[str, bytes | Failure]]:
        """Yield the replies that have arrived, message by message; report those that are late.

        Flower's store keeps the others until they are fetched. An exception while fetching or
        reading one client's reply is a failure of that client only.
        """
        for message_id in list(self._expired):
            for late in self._pull(message_id)[:1]:
                self._ignore_late(message_id, late)
        for client, task in list(pending.items()):
            replies = self._pull(task.message_id) if task.message_id else []
            if not replies:
                continue
            reply = replies[0]
            # a lost connection, or an answer
            if reply is None:
                self._mark_lost(client, task)
                self._abandon(task)
                continue
            del pending[client]
            if isinstance(reply, Failure):
                yield client, self._fail(client, reply.reason)
            else:
                self._callback.on_reply(client, len(reply))
                yield client, reply

    def _mark_lost(self, client: str, task: _PendingTask) -> None:
        """Record that a client's connection was lost."""
        if task.disconnected_at is None:
            task.disconnected_at = self._missing_since.setdefault(client, time.monotonic())
            LOG.warning("%s lost its connection", client)

    def _abandon(self, task: _PendingTask) -> None:
        """Delete what is left of a message whose client's connection was lost."""
        if task.message_id is not None:
            self._roster.discard(task.message_id)
            task.message_id = None

    def _pull(self, message_id: str) -> list[bytes | Failure | None]:
        """Return the replies to one message: at most one, unless Flower errs."""
        try:
            return [
                read_reply(reply)
                for reply in self._grid.pull_messages([message_id])
                if reply.metadata.reply_to_message_id == message_id
            ]
        except Exception as error:
            return [Failure(f"its answer could not be read: {type(error).__name__}: {error}")]

    def _ignore_late(self, message_id: str, reply: bytes | Failure | None) -> None:
        """Report a reply that arrived after its deadline."""
        task = self._expired.pop(message_id)
        if isinstance(reply, bytes):
            seconds = time.monotonic() - task.expired_at
            LOG.warning("%s answered %.0f s too late; ignored", task.client, seconds)
            self._callback.on_late_reply(task.client)

    def _resend(self, round_trip: _RoundTrip) -> Iterator[tuple[str, Failure]]:
        """Send their tasks to clients that have come back; what they were sent before is lost."""
        online = self._online(round_trip.tasks)
        self._callback.on_nodes(self._roster.registered(), sorted(online))
        for client, task in list(round_trip.pending.items()):
            session = online.get(client)
            if session is None:
                # Flower does not report a client that left while its reply was arriving
                self._mark_lost(client, task)
                continue
            if task.disconnected_at is not None or session != task.session:
                self._abandon(task)
                del round_trip.pending[client]
                LOG.warning("%s came back; it is asked again", client)
                failure = self._push(client, session, round_trip)
                if failure is not None:
                    yield client, failure

    def _give_up(self, pending: dict[str, _PendingTask]) -> Iterator[tuple[str, Failure]]:
        """Take back the unanswered tasks and yield their clients' failures."""
        self._roster.withdraw(task.message_id for task in pending.values() if task.message_id)
        for client, task in pending.items():
            reason = "lost its connection and did not come back in time"
            if task.message_id and task.disconnected_at is None:
                reason = f"no answer within {self._round_timeout:g} s"
                self._expired[task.message_id] = _ExpiredTask(client, time.monotonic())
            else:
                self._abandon(task)
            yield client, self._fail(client, reason)

    def _fail(self, client: str, reason: str) -> Failure:
        """Report and return a client's failure."""
        # the client's text goes to the terminal, to logs and to status.json
        reason = printable(reason, MAX_REASON)
        self._callback.on_failure(client, reason)
        return Failure(reason)
