"""The coordinator's port: connections by the hundred cost the run nothing, whoever opens them.

uvicorn speaks HTTP on each connection. It does not count connections, wait for a TLS handshake no longer than so
long, or hang up on whoever never finishes a request; so connections are accepted here, and given to it one by one.

A connection is a stranger's until a request with an admitted node's signature came over it. Strangers' connections
are few, in all and from one address, and short: a new one pushes out the oldest, so that a node gets in, however many
are held open. Together with the nodes' they stay far below the process's limit of open files: what the run needs for
its checkpoints is always there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import ServerState

from fedmomentum.errors import ConfigError
from fedmomentum.flower.gate import App

LOG = logging.getLogger("fedmomentum")


@dataclass(frozen=True)
class Limits:
    """How many connections there may be, and for how long.

    Attributes:
        in_all: Connections, nodes' and strangers'.
        strangers: Connections over which no signed request came.
        one_address: Of those, from one address.
        one_node: Connections over which the last request was one node's.
        stranger_seconds: How long a stranger's connection lives.
        handshake_seconds: How long a TLS handshake may take; no longer than a stranger's connection lives.
        quiet_seconds: How long a node's connection may be without a whole request.
    """

    in_all: int
    strangers: int = 128
    one_address: int = 32
    one_node: int = 32
    stranger_seconds: float = 15.0
    handshake_seconds: float = 10.0
    quiet_seconds: float = 60.0


MOST_FILES = 65536
ACCEPT_PAUSE_SECONDS = 0.5


def raise_file_limit() -> int:
    """Raise the process's limit of open files as far as it may itself; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return soft
        return wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def default_limits() -> Limits:
    """Return limits of which the run need not be afraid: half of the files that may be open are for connections."""
    in_all = min(4096, raise_file_limit() // 2)
    return Limits(in_all=in_all, strangers=min(128, in_all // 2), one_address=min(32, in_all // 4))


@dataclass(eq=False)
class _Peer:
    """One connection.

    Attributes:
        listener: Its owner.
        address: The other end's.
        socket: Of the connection.
        node: Whose request was the last; "" for a stranger's.
        num_busy: Requests that are being answered.
        since: When it was opened, became a node's, or last finished a request.
        task: Makes the connection ready.
        transport: Of the connection, once it is ready.
    """

    listener: Listener
    address: str
    socket: socket.socket
    node: str = ""
    num_busy: int = 0
    since: float = 0.0
    task: asyncio.Task[None] | None = None
    transport: asyncio.BaseTransport | None = None

    def signed_by(self, name: str) -> None:
        self.listener.signed(self, name)

    def busy(self) -> None:
        self.num_busy += 1

    def idle(self) -> None:
        self.num_busy -= 1
        self.since = self.listener.now()


class Listener:
    """Listens on a port, in a thread of its own; a context manager.

    Args:
        app: Answers the requests (ASGI); finds the connection as `scope["state"]["peer"]`.
        host: Address to listen on; a name may stand for several.
        port: Port to listen on; 0 for a free one.
        certificate: The server's, PEM.
        key: Its private key, PEM.
        limits: See `Limits`.

    Raises:
        ConfigError: If the port cannot be had, or certificate and key are none.
    """

    def __init__(
        self, app: App, host: str, port: int, *, certificate: Path, key: Path, limits: Limits | None = None
    ) -> None:
        self.limits = limits or default_limits()
        self.host = host
        self._port = port
        self._tls = _tls(certificate, key)
        self._config = uvicorn.Config(
            app, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            date_header=False, proxy_headers=False, timeout_keep_alive=30,
        )  # fmt: skip
        self._state = ServerState()
        self._peers: dict[_Peer, None] = {}  # in the order in which they came
        self._sockets: list[socket.socket] = []
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._ready = threading.Event()
        self._is_up = False
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def __enter__(self) -> Listener:
        self._sockets = _bound(self.host, self._port)
        self._thread.start()
        self._ready.wait()
        if not self._is_up:
            raise ConfigError(f"the service on {self.host}:{self._port} did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._sockets[0].getsockname()[1])

    def now(self) -> float:
        """Return the loop's time."""
        return self._loop.time()

    def num_connections(self) -> int:
        """Return how many connections are open."""
        return len(self._peers)

    # ── in the thread ──

    def _run(self) -> None:
        factory = self._config.get_loop_factory() or asyncio.new_event_loop
        self._loop = factory()
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._ready.set()
            self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._loop.set_exception_handler(lambda loop, context: LOG.debug("%s", context.get("message")))
        self._config.load()
        accepting = [asyncio.ensure_future(self._accept(listening)) for listening in self._sockets]
        sweeping = asyncio.ensure_future(self._sweep())
        self._is_up = True
        self._ready.set()
        await self._stop.wait()
        for task in (*accepting, sweeping):
            task.cancel()
        for listening in self._sockets:
            listening.close()
        for peer in list(self._peers):
            self._drop(peer)
        await asyncio.sleep(0)

    async def _accept(self, listening: socket.socket) -> None:
        """Accept for ever: an error of one connection, or a lack of files, ends nothing."""
        while True:
            try:
                accepted, address = await self._loop.sock_accept(listening)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room()
                    await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            self._welcome(accepted, str(address[0]))

    def _welcome(self, accepted: socket.socket, address: str) -> None:
        """Take a connection in; a stranger's oldest goes where there are too many."""
        limits = self.limits
        strangers = [peer for peer in self._peers if not peer.node]
        from_there = [peer for peer in strangers if peer.address == address]
        if len(from_there) >= limits.one_address:
            self._drop(from_there[0])
        elif len(strangers) >= limits.strangers:
            # the address that holds most gives up its oldest, so that one address cannot push out all others
            (busiest, _), *_ = Counter(peer.address for peer in strangers).most_common(1)
            self._drop(next(peer for peer in strangers if peer.address == busiest))
        elif len(self._peers) >= limits.in_all:
            self._make_room()
            if len(self._peers) >= limits.in_all:
                accepted.close()
                return
        peer = _Peer(self, address, accepted, since=self.now())
        self._peers[peer] = None
        peer.task = asyncio.ensure_future(self._serve(peer))
        peer.task.add_done_callback(lambda task: accepted.close() if peer.transport is None else None)

    async def _serve(self, peer: _Peer) -> None:
        """Do the TLS handshake, and give the connection to uvicorn."""
        peer.socket.setblocking(False)
        try:
            peer.transport, _ = await self._loop.connect_accepted_socket(
                lambda: _Http(self, peer),
                peer.socket,
                ssl=self._tls,
                ssl_handshake_timeout=self.limits.handshake_seconds,
                ssl_shutdown_timeout=5.0,
            )
        except (OSError, ssl.SSLError, asyncio.CancelledError, RuntimeError):
            self.gone(peer)

    def signed(self, peer: _Peer, name: str) -> None:
        """Note whose request came over a connection; that node's longest idle one goes where it has too many."""
        peer.node = name
        peer.since = self.now()
        theirs = [other for other in self._peers if other.node == name and other is not peer]
        if len(theirs) >= self.limits.one_node:
            idle = sorted((other for other in theirs if not other.num_busy), key=lambda other: other.since)
            self._drop((idle or theirs)[0])

    def _make_room(self) -> None:
        """Drop the oldest connection of a stranger, if there is one."""
        for peer in self._peers:
            if not peer.node:
                self._drop(peer)
                return

    async def _sweep(self) -> None:
        """Hang up on strangers after a while, and on nodes that begin a request and do not finish it."""
        while True:
            await asyncio.sleep(1.0)
            now, limits = self.now(), self.limits
            for peer in list(self._peers):
                patience = limits.quiet_seconds if peer.node else limits.stranger_seconds
                if not peer.num_busy and now > peer.since + patience:
                    self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self.gone(peer)
        if peer.transport is not None:
            peer.transport.abort()  # type: ignore[attr-defined]
        elif peer.task is not None:
            peer.task.cancel()

    def gone(self, peer: _Peer) -> None:
        """Note that a connection has ended."""
        self._peers.pop(peer, None)

    def protocol_arguments(self, peer: _Peer) -> dict[str, Any]:
        """Return what uvicorn's protocol is made with."""
        return {"config": self._config, "server_state": self._state, "app_state": {"peer": peer}}


class _Http(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol, which tells the listener when its connection has ended."""

    def __init__(self, listener: Listener, peer: _Peer) -> None:
        super().__init__(**listener.protocol_arguments(peer))
        self._listener = listener
        self._peer = peer

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._listener.gone(self._peer)


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{certificate} and {key} are no certificate and its key: {error}; make them with: fedmomentum keys server"
        ) from error
    return context


def _bound(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets on all addresses that the host's name stands for.

    Raises:
        ConfigError: If there are none, or the port is in use.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in _unique(found):
            listening = socket.socket(family, kind, protocol)
            sockets.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # a free port that was found for the first address is the port of the others too
            chosen = port or (sockets[0].getsockname()[1] if len(sockets) > 1 else 0)
            listening.bind((address[0], chosen, *address[2:]))
            listening.listen(512)
            listening.setblocking(False)
    except OSError as error:
        for listening in sockets:
            listening.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}; is the port in use, and the address this machine's? ({error.strerror})"
        ) from error
    return sockets


def _unique(found: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(found))
