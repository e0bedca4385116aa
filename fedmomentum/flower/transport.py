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
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmomentum.errors import QuorumError
from fedmomentum.transport import Failure

LOG = logging.getLogger("fedmomentum")
MAX_PAYLOAD_BYTES = 2**31 - 2**20
"""The largest payload. Flower was seen to carry 2.2 GiB, at four times that in the node's memory."""
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
        assert isinstance(payload, ArrayRecord) and isinstance(limits, ConfigRecord)
        seconds = limits["seconds"]
        assert isinstance(seconds, float)
        return payload["head"].data + payload["body"].data, seconds
    except (KeyError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError("a message without a payload") from error


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
        (name,) = self._grid.push_messages([message])
        if not name:
            return self._failed(asked.client, "Flower did not take the message")
        pending[name] = asked
        self._observer("sent", {"client": asked.client, "bytes": len(payload), "seconds": seconds})
        return None

    def _collect(self, pending: dict[str, _Pending]) -> Iterator[tuple[str, bytes | Failure]]:
        """What has come, message by message: Flower's store keeps the others until they are asked for."""
        waiting = [name for name, asked in pending.items() if asked.gone is None]
        for asked_for in [*waiting, *self._late]:
            for reply in self._grid.pull_messages([asked_for]):
                name = reply.metadata.reply_to_message_id
                if name in self._late:
                    client, since = self._late.pop(name)
                    if reply.has_content():
                        LOG.warning("%s answered %.0f s too late; ignored", client, time.monotonic() - since)
                        self._observer("late", {"client": client})
                elif name in pending:
                    if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                        pending[name].gone = time.monotonic()
                        LOG.warning("%s lost its connection", pending[name].client)
                        continue
                    asked = pending.pop(name)
                    yield asked.client, self._answer(asked.client, reply)

    def _answer(self, client: str, reply: Message) -> bytes | Failure:
        if reply.has_error():
            return self._failed(client, reply.error.reason or f"Flower's error {reply.error.code}")
        try:
            payload, _ = unpacked(reply.content)
        except ValueError as error:
            return self._failed(client, f"its answer could not be read: {error}")
        self._observer("answered", {"client": client, "bytes": len(payload)})
        return payload

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
        self._observer("failed", {"client": client, "reason": reason})
        return Failure(reason)
