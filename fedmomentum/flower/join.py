"""A client's process: a node that fetches tasks, has its worker do them, and sends replies."""

from __future__ import annotations

import hashlib
import ipaddress
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict

from fedmomentum.errors import ConfigError
from fedmomentum.flower.apps import client_app, error_reply
from fedmomentum.flower.certificates import HOST_NAME
from fedmomentum.flower.fleet_client import ConnectionLost, FleetClient
from fedmomentum.flower.keys import NODE_NAME, load_private_key
from fedmomentum.flower.node_callback import NodeCallback, TaskInfo
from fedmomentum.flower.parties import node_identity, spoken_fingerprint
from fedmomentum.flower.worker import Worker, WorkerError
from fedmomentum.protocol.codec import decode_task
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config


POLL_SECONDS = 1.0
"""How often the node asks the server for work."""
MAX_RETRY_SECONDS = 30.0
"""The longest pause before reconnecting; a server that is back is found within this time."""
SMOKE_TEST_SECONDS = 600.0
"""How long the training step of `join --check` may take."""


@dataclass(frozen=True)
class NodeIdentity:
    """Which node joins which server.

    Attributes:
        server: The server's `host:port`.
        authority: PEM file with the certificate of the server's authority.
        key: The node's private key.
        store: Directory for the objects that the server sends.
        name: The name under which the server admitted the node.
    """

    server: str
    authority: Path
    key: Path
    store: Path
    name: str

    def fleet_client(self) -> FleetClient:
        """Return an unopened connection to the server.

        Raises:
            ConfigError: If a file is missing, unreadable or accessible to others, or the address
                has no port.
        """
        server = server_address(self.server)
        if not self.authority.is_file():
            raise ConfigError(
                f"there is no authority {self.authority}; the server has it, as keys/ca.pem. Give "
                "its path by --ca"
            )
        if not NODE_NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name!r} is not a valid node name; give the name under which this node was "
                "admitted, --name"
            )
        key = load_private_key(self.key)
        try:
            return FleetClient(server, self.authority.read_bytes(), key)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.authority} is no authority's certificate: {error}") from error


def server_address(text: str) -> str:
    """Return the value of `--server` as `HOST:PORT`, in the form used in URLs.

    A leading `https://` and a trailing slash are removed; IPv6 addresses are put in brackets.

    Raises:
        ConfigError: If it is not a host and a port, or asks for something other than TLS.
    """
    shown = f"--server {printable(text, 200)!r}"
    # the scheme: TLS, or none
    address = text.strip()
    scheme, separator, after_scheme = address.partition("://")
    if separator:
        if scheme.lower() != "https":
            raise ConfigError(f"{shown}: the server speaks TLS only; give HOST:PORT")
        address = after_scheme
    # host and port
    host, _, port = address.removesuffix("/").rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigError(
            "--server must be HOST:PORT, such as fed.example.org:9443 or [2001:db8::1]:9443; got "
            f"{printable(text, 200)!r}"
        )
    if host.startswith("[") and host.endswith("]"):
        host = _bracketed_ipv6(host[1:-1], shown)
    elif ":" in host:
        raise ConfigError(f"{shown}: an IPv6 address stands in brackets, [2001:db8::1]:9443")
    elif not HOST_NAME.fullmatch(host):
        raise ConfigError(
            f"{shown}: {printable(host, 200)!r} is neither a host name nor an address"
        )
    return f"{host}:{int(port)}"


def _bracketed_ipv6(text: str, shown: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        address = None
    if address is None or address.scope_id:
        raise ConfigError(f"{shown}: what stands in brackets is not an IPv6 address")
    return f"[{address}]"


# ── taking part ──


def join(
    config: Config, identity: NodeIdentity, stop: threading.Event, callback: NodeCallback
) -> None:
    """Take part until `stop` is set, reconnecting whatever happens to the network or server.

    Args:
        config: The client's configuration.
        identity: Which node joins which server.
        stop: Set it to leave.
        callback: Receives events.

    Raises:
        ConfigError: See `NodeIdentity.fleet_client`.
        WorkerError: If the model or data cannot be loaded.
    """
    # report mistakes in keys, names and roster before anything is loaded
    identity.fleet_client()
    party = node_identity(config, identity.name, identity.key)
    if party is not None:
        callback.on_message(
            f"Roster of {len(party.roster.keys)}, fingerprint {spoken_fingerprint(party.roster)}"
        )
    # load model and data once, for all connections
    worker = Worker(config, identity.name, identity.store, callback, identity.key)
    try:
        worker.wait_until_ready()
        handler = _TaskHandler(worker, callback)
        app = client_app(lambda payload, timeout, context: handler(payload, timeout))
        num_failures = 0
        # one connection after another
        while not stop.is_set():
            try:
                with identity.fleet_client() as connection:
                    callback.on_connected(identity.server)
                    num_failures = 0
                    _answer_messages(connection, app, stop)
            except (ConnectionLost, ConfigError) as error:
                # a ConfigError means that a file is being replaced, since it was valid at the start
                num_failures += 1
                backoff = min(MAX_RETRY_SECONDS, 2.0 ** min(num_failures, 5))
                delay = backoff * random.uniform(0.7, 1.0)  # staggers the nodes' return
                callback.on_connection_lost(str(error), delay)
                stop.wait(delay)
    finally:
        worker.stop()


def _answer_messages(
    connection: FleetClient, app: Callable[..., Message], stop: threading.Event
) -> None:
    """Answer messages one by one."""
    while not stop.is_set():
        message = connection.pull()
        if message is None:
            stop.wait(POLL_SECONDS)
            continue
        connection.push(_reply(message, app))


def _reply(message: Message, app: Callable[..., Message]) -> Message:
    """Return the app's reply, or an error with what the server may learn of its exception.

    Raises:
        ConnectionLost: If the message cannot even be answered with an error.
    """
    metadata = message.metadata
    try:
        context = Context(metadata.run_id, metadata.dst_node_id, {}, RecordDict(), {})
        return app(message=message, context=context)
    except Exception as error:
        raised = error
    try:
        return error_reply(message, raised)
    except Exception as error:
        raise ConnectionLost(f"a message cannot be answered: {type(error).__name__}") from error


class _TaskHandler:
    """Hands tasks to the worker.

    The last reply is kept: if the connection breaks while it is being sent, the server repeats the
    task, which then need not be trained again.
    """

    def __init__(self, worker: Worker, callback: NodeCallback) -> None:
        self._worker = worker
        self._callback = callback
        self._last_digest = b""
        self._last_reply = b""

    def __call__(self, payload: bytes, timeout: float) -> bytes:
        task = decode_task(payload)
        info = TaskInfo(task.kind, task.server_round)
        digest = hashlib.sha256(payload).digest()
        if digest == self._last_digest:
            self._callback.on_repeated_task(info)
            return self._last_reply
        self._callback.on_task(info, len(payload))
        self._worker.set_run(task.run_id)
        started = time.monotonic()
        try:
            reply = self._worker.run_task(payload, timeout)
        except WorkerError as error:
            self._callback.on_task_failed(error.detail)
            raise
        self._callback.on_task_done(info, len(reply), time.monotonic() - started)
        self._last_digest = digest
        self._last_reply = reply
        return reply


# ── the pre-flight check ──


@dataclass(frozen=True)
class CheckResult:
    """What was checked, and the problem found; "" if none."""

    name: str
    problem: str


def preflight_check(
    config: Config, identity: NodeIdentity, callback: NodeCallback
) -> list[CheckResult]:
    """Check whether this node can take part.

    Checks the keys, the base model and data, a training step, and whether the server admits it.

    Args:
        config: The client's configuration.
        identity: Which node would join which server.
        callback: Receives events.
    """
    results: list[CheckResult] = []

    def passes(name: str, check: Callable[[], object]) -> bool:
        problem = ""
        try:
            check()
        except WorkerError as error:
            problem = error.detail
        except (ConfigError, ConnectionLost) as error:
            problem = str(error)
        results.append(CheckResult(name, problem))
        return not problem

    passes("key, authority and name", identity.fleet_client)
    if config.privacy.secure_aggregation:
        passes(
            f"the roster {config.privacy.roster}",
            lambda: node_identity(config, identity.name, identity.key),
        )
    with tempfile.TemporaryDirectory() as directory:
        worker = Worker(config, identity.name, Path(directory), callback, identity.key)
        try:
            if passes("base model and data", worker.wait_until_ready):
                passes("a step of training", lambda: worker.run_smoke_test(SMOKE_TEST_SECONDS))
        finally:
            worker.stop()
    passes(f"the server {identity.server}", lambda: identity.fleet_client().probe())
    return results
