"""The Flower transport: encoded tasks to nodes and their replies back, over any `Grid`, with deadlines throughout.

Flower itself waits without end for nodes, leaves a node that hangs out of its answers without a word, and names the
wrong node in errors of its own. So what was sent is held against what came, message by message.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import DEFAULT_TTL, Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid

from fedmomentum.errors import QuorumError
from fedmomentum.schema import printable
from fedmomentum.transport import Failure

LOG = logging.getLogger("fedmomentum")
MAX_PAYLOAD_BYTES = 2**31 - 2**20
"""The largest payload. Flower was seen to carry 2.2 GiB, at four times that in the node's memory."""
MAX_REASON = 500
"""Characters of what a client says went wrong."""
POLL_SECONDS = 0.2
CHECK_SECONDS = 2.0
"""How often to look who is connected."""
AWAY_SECONDS = 30.0
"""How long a round that has all other answers waits for a client since it lost its connection."""


@dataclass(frozen=True)
class Session:
    """One connection of a node: a node that was away, or started anew, has another `since`."""

    node_id: int
    since: str


class Roster(Protocol):
    """Who may take part, and who is there."""

    def registered(self) -> Sequence[str]:
        """The names of all who may take part, sorted."""
        ...

    def online(self) -> Mapping[str, Session]:
        """Those who are connected."""
        ...

    def withdraw(self, names: Iterable[str]) -> None:
        """Take back the messages of these names that nobody has fetched yet."""
        ...


def packed(payload: bytes, seconds: float = 0.0) -> RecordDict:
    """A payload as a Flower record, with how long its answer may take; Flower cuts it into parts of 5 MB by itself.

    Head and body apart: all clients that lack the same objects are sent the same body, and Flower's store keeps equal
    parts once. So what waits there does not grow with the clients.
    """
    cut = min(8 + int.from_bytes(payload[:8], "little"), len(payload))  # safetensors: the header's length is in front
    arrays = {
        name: Array("uint8", (len(part),), "bytes", part)
        for name, part in (("head", payload[:cut]), ("body", payload[cut:]))
    }
    return RecordDict({"payload": ArrayRecord(arrays), "limits": ConfigRecord({"seconds": float(seconds)})})


def unpacked(content: RecordDict) -> tuple[bytes, float]:
    """The payload of a record, and its seconds.

    Raises:
        ValueError: it has another form.
    """
    try:
        payload, limits = content["payload"], content["limits"]
        if not isinstance(payload, ArrayRecord) or not isinstance(limits, ConfigRecord):
            raise TypeError("other records")
        seconds = limits["seconds"]
        if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
            raise TypeError("no duration")
        return payload["head"].data + payload["body"].data, seconds
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError("a message without a payload") from error


def _read(reply: Message) -> bytes | Failure | None:
    """Return the payload of a reply, why there is none, or None if Flower itself says that the node is gone.

    Raises:
        Exception: Whatever Flower's records raise that are none.
    """
    if reply.has_error():
        error = reply.error
        if error.code == ErrorCode.NODE_UNAVAILABLE and reply.metadata.src_node_id == SUPERLINK_NODE_ID:
            return None
        return Failure(str(error.reason or f"Flower's error {error.code}"))
    try:
        return unpacked(reply.content)[0]
    except ValueError as error:
        return Failure(f"its answer could not be read: {error}")


@dataclass
class _Pending:
    client: str
    session: Session
    gone: float | None = None
    """Since when its connection is lost, and with it the question."""

    def may_answer(self) -> bool:
        return self.gone is None or time.monotonic() < self.gone + AWAY_SECONDS


class FlowerTransport:
    """`Transport` over a Flower `Grid`.

    Args:
        grid: Flower's, or the link's.
        roster: names of nodes.
        round_seconds: how long clients have for one answer.
        join_seconds: how long to wait for nodes.
        start_seconds: how long of that the start waits for all of them, if the quorum is there; join_seconds if None.
        quorum: the share of the registered nodes without which no round begins.
        observer: told `waiting`, `sent`, `answered`, `failed`, `late`, `nodes`.
    """

    max_payload_bytes = MAX_PAYLOAD_BYTES

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        *,
        round_seconds: float,
        join_seconds: float,
        quorum: float,
        start_seconds: float | None = None,
        observer: Callable[[str, Mapping[str, Any]], None] = lambda event, facts: None,
    ) -> None:
        self._grid, self._roster, self._observer = grid, roster, observer
        self._round_seconds, self._join_seconds, self._quorum = round_seconds, join_seconds, quorum
        self._start_seconds = join_seconds if start_seconds is None else min(start_seconds, join_seconds)
        self._started = False
        self._late: dict[str, tuple[str, float]] = {}  # message id to the client and when it was given up

    def clients(self) -> Sequence[str]:
        """Who is connected, sorted. A start waits for all for a while, a round for the quorum up to join_seconds.

        Raises:
            QuorumError: fewer than the quorum after that time.
        """
        begun = time.monotonic()
        end = begun + self._join_seconds
        while True:
            registered, online = self._roster.registered(), sorted(self._roster.online())
            enough = max(1, math.ceil(self._quorum * len(registered) - 1e-9))
            wait_for_all = not self._started and time.monotonic() < begun + self._start_seconds
            wanted = max(1, len(registered)) if wait_for_all else enough
            missing = sorted(set(registered) - set(online))
            self._observer("nodes", {"registered": registered, "online": online})
            if len(online) >= wanted:
                break
            if time.monotonic() >= end:
                raise QuorumError(
                    f"{len(online)} of {len(registered)} registered clients are connected after "
                    f"{self._join_seconds:g} s, and {enough} are needed (federation.quorum). Missing: "
                    f"{', '.join(missing) or 'none is registered'}. Start them and resume"
                )
            until = begun + self._start_seconds if wait_for_all and len(online) >= enough else end
            self._observer("waiting", {"for": missing, "seconds": until - time.monotonic()})
            time.sleep(CHECK_SECONDS)
        if missing and not self._started:
            LOG.warning("starting without %s", ", ".join(missing))
        self._started = True
        return online

    def send_and_receive(self, tasks: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Ask all at once; wait until each has answered or failed, but not beyond `round_seconds`.

        A client that loses its connection and comes back within that time is asked again; a round that has all
        other answers waits no longer than `AWAY_SECONDS` for it. Answers are fetched one at a time.
        """
        pending: dict[str, _Pending] = {}
        online, end = self._roster.online(), time.monotonic() + self._round_seconds
        for client in tasks:
            if client not in online:
                yield client, self._failed(client, "not connected")
            elif failure := self._push(_Pending(client, online[client]), tasks, end, pending):
                yield client, failure
        checked = time.monotonic()
        while time.monotonic() < end and any(asked.may_answer() for asked in pending.values()):
            yield from self._collect(pending)
            if time.monotonic() > checked + CHECK_SECONDS:
                checked = time.monotonic()
                yield from self._ask_again(pending, tasks, end)
            time.sleep(POLL_SECONDS)
        self._roster.withdraw(pending)
        for name, asked in pending.items():
            reason = "lost its connection and did not come back in time"
            if asked.gone is None:
                reason = f"no answer within {self._round_seconds:g} s"
                self._late[name] = asked.client, time.monotonic()
            yield asked.client, self._failed(asked.client, reason)

    def _push(
        self, asked: _Pending, tasks: Mapping[str, bytes], end: float, pending: dict[str, _Pending]
    ) -> Failure | None:
        seconds, payload = max(1.0, end - time.monotonic()), tasks[asked.client]
        message = Message(
            packed(payload, seconds), asked.session.node_id, MessageType.TRAIN,
            ttl=max(float(DEFAULT_TTL), 2 * self._round_seconds),
        )  # fmt: skip
        try:
            (name,) = self._grid.push_messages([message])
        except Exception as error:
            return self._failed(asked.client, f"the message could not be sent: {type(error).__name__}: {error}")
        if not name:
            return self._failed(asked.client, "Flower did not take the message")
        pending[name] = asked
        self._observer("sent", {"client": asked.client, "bytes": len(payload), "seconds": seconds})
        return None

    def _collect(self, pending: dict[str, _Pending]) -> Iterator[tuple[str, bytes | Failure]]:
        """What has come, message by message: Flower's store keeps the others until they are asked for.

        Whatever is raised while one client's answer is fetched and read ends that client's part, and nothing else.
        """
        waiting = [name for name, asked in pending.items() if asked.gone is None]
        for name in [*waiting, *self._late]:
            try:
                answers = [
                    _read(reply)
                    for reply in self._grid.pull_messages([name])
                    if reply.metadata.reply_to_message_id == name
                ]
            except Exception as error:
                answers = [Failure(f"its answer could not be read: {type(error).__name__}: {error}")]
            for answer in answers[:1]:
                if name in self._late:
                    client, since = self._late.pop(name)
                    if not isinstance(answer, Failure) and answer is not None:
                        LOG.warning("%s answered %.0f s too late; ignored", client, time.monotonic() - since)
                        self._observer("late", {"client": client})
                elif answer is None:
                    pending[name].gone = time.monotonic()
                    LOG.warning("%s lost its connection", pending[name].client)
                else:
                    client = pending.pop(name).client
                    yield client, self._answer(client, answer)

    def _answer(self, client: str, answer: bytes | Failure) -> bytes | Failure:
        if isinstance(answer, Failure):
            return self._failed(client, answer.reason)
        self._observer("answered", {"client": client, "bytes": len(answer)})
        return answer

    def _ask_again(
        self, pending: dict[str, _Pending], tasks: Mapping[str, bytes], end: float
    ) -> Iterator[tuple[str, Failure]]:
        """Ask clients anew that have started anew since they were asked; the old question is lost to them."""
        online = self._roster.online()
        self._observer("nodes", {"registered": self._roster.registered(), "online": sorted(online)})
        for name, asked in list(pending.items()):
            now = online.get(asked.client)
            if now is not None and (asked.gone is not None or now != asked.session):
                del pending[name]
                LOG.warning("%s came back; it is asked again", asked.client)
                if failure := self._push(_Pending(asked.client, now), tasks, end, pending):
                    yield asked.client, failure

    def _failed(self, client: str, reason: str) -> Failure:
        reason = printable(reason, MAX_REASON)  # a client's words go to the terminal, logs and status.json
        self._observer("failed", {"client": client, "reason": reason})
        return Failure(reason)
