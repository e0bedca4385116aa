"""A party's process: a node that fetches tasks, has its worker do them, and sends the replies."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from fedmomentum.config import Config
from fedmomentum.errors import ConfigError, public_text
from fedmomentum.flower.apps import client_app
from fedmomentum.flower.connection import Connection, ConnectionLost
from fedmomentum.flower.keys import HOST_NAME, NODE_NAME, load_private
from fedmomentum.flower.worker import Told, Worker, WorkerError
from fedmomentum.messages import decode_task
from fedmomentum.schema import printable

LOG = logging.getLogger("fedmomentum")
POLL_SECONDS = 1.0
LONGEST_WAIT = 30.0
RAISED = 2
"""Flower's code of an app that raised."""
MAX_REASON = 1000
"""Characters of what the server is told when a task fails."""


@dataclass(frozen=True)
class Party:
    """Who joins what.

    Attributes:
        server: `host:port`.
        authority: the server's authority, a PEM file.
        key: the node's private key; its name without the ending is the party's, unless `name` is given.
        store: folder for the objects it is sent.
        name: the name under which the coordinator admitted the node.
    """

    server: str
    authority: Path
    key: Path
    store: Path
    name: str

    def connection(self) -> Connection:
        """A connection that is not open yet.

        Raises:
            ConfigError: a file that is missing, unreadable or readable by others, or an address without a port.
        """
        server = server_address(self.server)
        if not self.authority.is_file():
            raise ConfigError(
                f"there is no authority {self.authority}; the coordinator has it, as keys/ca.pem. Give its path by --ca"
            )
        if not NODE_NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} is no name for a node; give the name it was admitted under, --name")
        key = load_private(self.key)
        try:
            return Connection(server, self.authority.read_bytes(), key)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.authority} is no authority's certificate: {error}") from error


def server_address(text: str) -> str:
    """Return `HOST:PORT` as it stands in a URL, of what was given by `--server`.

    `https://` in front and a slash behind are taken away; an IPv6 address stands in brackets.

    Raises:
        ConfigError: If it is no host and port, or asks for something else than TLS.
    """
    rest = text.strip()
    scheme, separator, after = rest.partition("://")
    if separator:
        if scheme.lower() != "https":
            raise ConfigError(f"--server {printable(text, 200)!r}: the server speaks TLS only; give HOST:PORT")
        rest = after
    host, _, port = rest.removesuffix("/").rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--server must be HOST:PORT, such as fed.example.org:9443 or [2001:db8::1]:9443; got "
            f"{printable(text, 200)!r}"
        )
    if host.startswith("[") and host.endswith("]"):
        try:
            address = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            address = None
        if address is None or address.scope_id:
            raise ConfigError(f"--server {printable(text, 200)!r}: what stands in brackets is no IPv6 address")
        return f"[{address}]:{int(port)}"
    if ":" in host:
        raise ConfigError(f"--server {printable(text, 200)!r}: an IPv6 address stands in brackets, [2001:db8::1]:9443")
    if not HOST_NAME.fullmatch(host):
        raise ConfigError(f"--server {printable(text, 200)!r}: {printable(host, 200)!r} is no host name and no address")
    return f"{host}:{int(port)}"


def join(config: Config, party: Party, stop: threading.Event, told: Told) -> None:
    """Take part until `stop` is set. Whatever happens to network or server, connect again.

    Args:
        config: the party's.
        party: who joins what.
        stop: set it to leave.
        told: told of progress: `say`, `warning`, `step` and `ready` of the worker; `connected`, `lost`, `task`, `done`.

    Raises:
        ConfigError: see `Party.connection`.
        WorkerError: model or data cannot be loaded.
    """
    party.connection()  # mistakes in keys and names are told before anything is loaded
    worker = Worker(config, party.name, party.store, told)
    try:
        worker.wait_until_ready()
        answers = _Answers(worker, told)
        app = client_app(lambda payload, seconds, context: answers(payload, seconds))
        tries, since = 0, time.monotonic()
        while not stop.is_set():
            try:
                with party.connection() as connection:
                    told("connected", {"server": party.server})
                    tries = 0
                    _serve(connection, app, stop)
            except (ConnectionLost, ConfigError) as error:  # a file that is being replaced; it was good at the start
                tries += 1
                wait = min(LONGEST_WAIT, 2.0 ** min(tries, 5)) * random.uniform(0.7, 1.0)
                told("lost", {"reason": str(error), "seconds": wait, "after": time.monotonic() - since})
                since = time.monotonic()
                stop.wait(wait)
    finally:
        worker.stop()


def _serve(connection: Connection, app: Callable[..., Message], stop: threading.Event) -> None:
    """Answer messages, one after the other."""
    while not stop.is_set():
        message = connection.pull()
        if message is None:
            stop.wait(POLL_SECONDS)
            continue
        connection.push(_answer(message, app))


def _answer(message: Message, app: Callable[..., Message]) -> Message:
    """Return the app's reply, or an error that says what may be said of what it raised.

    Raises:
        ConnectionLost: If the message is such that it cannot even be answered with an error.
    """
    metadata = message.metadata
    try:
        context = Context(metadata.run_id, metadata.dst_node_id, {}, RecordDict(), {})
        return app(message=message, context=context)
    except Exception as error:  # what it is stays in the node's log; what may be said of it goes to the server
        text = str(error) if isinstance(error, WorkerError) else public_text(error)
    try:
        return Message(Error(RAISED, printable(text, MAX_REASON)), reply_to=message)
    except Exception as error:
        raise ConnectionLost(f"a message cannot be answered: {type(error).__name__}") from error


class _Answers:
    """The worker's replies. The last is kept: a connection that breaks while it is sent costs no training anew."""

    def __init__(self, worker: Worker, told: Told) -> None:
        self._worker, self._told = worker, told
        self._last: tuple[bytes, bytes] | None = None

    def __call__(self, payload: bytes, seconds: float) -> bytes:
        task, digest = decode_task(payload), hashlib.sha256(payload).digest()
        about = {"kind": task.kind, "round": task.server_round}
        if self._last and self._last[0] == digest:
            self._told("again", about)
            return self._last[1]
        self._told("task", {**about, "bytes": len(payload), "seconds": seconds})
        self._worker.belong_to(task.run_id)
        started = time.monotonic()
        try:
            reply = self._worker.ask(payload, seconds)
        except WorkerError as error:
            self._told("failed", {"reason": error.detail})
            raise
        self._told("done", {**about, "bytes": len(reply), "seconds": time.monotonic() - started})
        self._last = digest, reply
        return reply


# ── the pre-flight ──


def check(config: Config, party: Party, told: Told) -> list[tuple[str, str | None]]:
    """Whether this party can take part: each thing that was looked at, and what is wrong with it, if anything is.

    Keys, base model and data, a step of training, and the way to the server.
    """
    results: list[tuple[str, str | None]] = []

    def look(what: str, act: Callable[[], Any]) -> Any:
        try:
            value = act()
        except (ConfigError, WorkerError, ConnectionLost) as error:
            results.append((what, error.detail if isinstance(error, WorkerError) else str(error)))
            return None
        results.append((what, None))
        return value

    look("key, authority and name", party.connection)
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(config, party.name, Path(folder), told)
        try:
            if look("base model and data", worker.wait_until_ready) is not None:
                look("a step of training", lambda: worker.rehearse(600.0))
        finally:
            worker.stop()
    look(f"the server {party.server}", lambda: party.connection().probe())
    return results
