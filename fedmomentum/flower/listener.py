"""The server's port: hundreds of connections cost the run nothing, no matter who opens them.

uvicorn speaks HTTP on each connection. It does not limit the number of connections or the duration
of a TLS handshake, nor does it hang up on clients that never finish a request; therefore
connections are accepted here and handed to uvicorn one by one.

A connection is a stranger's until a request signed by an admitted node has come over it. Strangers'
connections are limited in number, in total and from one address, and in duration. A new one
displaces the oldest, so that a node gets in however many are open. Together with the nodes' they
stay far below the process's limit of open files: the run always has the files it needs for its
checkpoints.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import ServerState

from fedmomentum.errors import ConfigError

if TYPE_CHECKING:
    from fedmomentum.flower.gate import App


LOG = logging.getLogger("fedmomentum")
MAX_OPEN_FILES = 65536
"""The limit of open files that is asked for; more connections than this are never needed."""
MAX_CONNECTIONS = 4096
"""Connections in total, where the limit of open files allows it."""
ACCEPT_PAUSE_SECONDS = 0.5
"""How long accepting pauses when the process has no more files or memory for sockets."""
SWEEP_SECONDS = 1.0
"""How often connections are checked for their time limits."""
LISTEN_BACKLOG = 512
"""Connections that the kernel queues; a burst of strangers must not keep a node out."""


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be, and for how long.

    Attributes:
        max_connections: Connections in total, nodes' and strangers'.
        max_strangers: Connections over which no signed request has come.
        max_per_address: Strangers' connections from one address.
        max_per_node: Connections over which the last request was one node's.
        stranger_seconds: How long a stranger's connection lives.
        handshake_seconds: How long a TLS handshake may take; at most as long as a stranger's
            connection lives.
        idle_seconds: How long a node's connection may go without a complete request.
    """

    max_connections: int
    max_strangers: int = 128
    max_per_address: int = 32
    max_per_node: int = 32
    stranger_seconds: float = 15.0
    handshake_seconds: float = 10.0
    idle_seconds: float = 60.0


def raise_file_limit() -> int:
    """Raise the process's limit of open files as far as the process may; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    # a process may raise its soft limit up to the hard one
    if soft != resource.RLIM_INFINITY and soft < target:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        except (OSError, ValueError):
            return soft
        return target
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def default_limits() -> ConnectionLimits:
    """Return limits that leave half of the files that may be open to the run."""
    max_connections = min(MAX_CONNECTIONS, raise_file_limit() // 2)
    return ConnectionLimits(
        max_connections=max_connections,
        max_strangers=min(128, max_connections // 2),
        max_per_address=min(32, max_connections // 4),
    )


@dataclass(eq=False)
class _Peer:
    """One connection.

    Attributes:
        listener: The listener that accepted it.
        address: The address at the other end.
        socket: The connection's socket.
        node: The node whose request came last; "" for a stranger's connection.
        num_busy: Requests that are being answered.
        active_at: When it was opened, became a node's, or last finished a request.
        task: Performs the TLS handshake.
        transport: The connection's transport, once the handshake is done.
    """

    listener: Listener
    address: str
    socket: socket.socket
    node: str = ""
    num_busy: int = 0
    active_at: float = 0.0
    task: asyncio.Task[None] | None = None
    transport: asyncio.BaseTransport | None = None

    def signed_by(self, name: str) -> None:
        self.listener.assign_to_node(self, name)

    def busy(self) -> None:
        self.num_busy += 1

    def idle(self) -> None:
        self.num_busy -= 1
        self.active_at = self.listener.now()


class Listener:
    """Listens on a port, in a thread of its own; a context manager.

    Args:
        app: Answers the requests (ASGI); finds the connection as `scope["state"]["peer"]`.
        host: Address to listen on; a host name may stand for several.
        port: Port to listen on; 0 for any free one.
        certificate: The server's certificate, PEM.
        key: The server's private key, PEM.
        limits: How many connections there may be; by default, see `default_limits`.

    Raises:
        ConfigError: If the port cannot be opened, or certificate and key are invalid.
    """

    def __init__(
        self,
        app: App,
        host: str,
        port: int,
        *,
        certificate: Path,
        key: Path,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self.limits = limits or default_limits()
        self.host = host
        self._port = port
        self._tls = _tls_context(certificate, key)
        self._config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
        )
        self._state = ServerState()
        self._peers: dict[_Peer, None] = {}  # in the order in which they came
        self._sockets: list[socket.socket] = []
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._ready = threading.Event()
        self._is_up = False
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def __enter__(self) -> Listener:
        self._sockets = _listening_sockets(self.host, self._port)
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
        """Return the event loop's time."""
        return self._loop.time()

    def num_connections(self) -> int:
        """Return how many connections are open."""
        return len(self._peers)

    # ── in the listener's thread ──

    def _run(self) -> None:
        factory = self._config.get_loop_factory() or asyncio.new_event_loop
        self._loop = factory()
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._ready.set()
            self._loop.close()

    async def _main(self) -> None:
        """Accept connections until the listener is stopped."""
        # strangers can cause errors of a connection at will: they are no warnings
        self._stop = asyncio.Event()
        self._loop.set_exception_handler(
            lambda loop, context: LOG.debug("%s", context.get("message"))
        )
        self._config.load()
        # accept on every address until the listener is stopped
        tasks = [asyncio.ensure_future(self._accept(sock)) for sock in self._sockets]
        tasks.append(asyncio.ensure_future(self._sweep()))
        self._is_up = True
        self._ready.set()
        await self._stop.wait()

        # close everything, at once
        for task in tasks:
            task.cancel()
        for sock in self._sockets:
            sock.close()
        for peer in list(self._peers):
            self._drop(peer)
        await asyncio.sleep(0)

    async def _accept(self, listening: socket.socket) -> None:
        """Accept forever: neither an error of one connection nor a shortage of files ends it."""
        while True:
            try:
                accepted, address = await self._loop.sock_accept(listening)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._drop_oldest_stranger()
                    await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            self._admit(accepted, str(address[0]))

    def _admit(self, accepted: socket.socket, address: str) -> None:
        """Take in a new connection, or close it if all that are open are nodes'."""
        if not self._make_room_for(address):
            accepted.close()
            return
        # the handshake runs concurrently: a slow one delays nobody
        peer = _Peer(self, address, accepted, active_at=self.now())
        self._peers[peer] = None
        peer.task = asyncio.ensure_future(self._serve(peer))
        peer.task.add_done_callback(
            lambda task: accepted.close() if peer.transport is None else None
        )

    def _make_room_for(self, address: str) -> bool:
        """Drop a stranger's connection if there are too many; return whether there is room."""
        limits = self.limits
        strangers = [peer for peer in self._peers if not peer.node]
        from_address = [peer for peer in strangers if peer.address == address]
        if len(from_address) >= limits.max_per_address:
            self._drop(from_address[0])
        elif len(strangers) >= limits.max_strangers:
            # the address with most connections gives up its oldest, so that one address cannot
            # displace all others
            counts = Counter(peer.address for peer in strangers)
            busiest = counts.most_common(1)[0][0]
            self._drop(next(peer for peer in strangers if peer.address == busiest))
        elif len(self._peers) >= limits.max_connections:
            self._drop_oldest_stranger()
            return len(self._peers) < limits.max_connections
        return True

    async def _serve(self, peer: _Peer) -> None:
        """Perform the TLS handshake, and hand the connection to uvicorn."""
        peer.socket.setblocking(False)
        try:
            peer.transport, _ = await self._loop.connect_accepted_socket(
                lambda: _HttpProtocol(peer, self._config, self._state),
                peer.socket,
                ssl=self._tls,
                ssl_handshake_timeout=self.limits.handshake_seconds,
                ssl_shutdown_timeout=5.0,
            )
        except (OSError, ssl.SSLError, asyncio.CancelledError, RuntimeError):
            self.forget(peer)

    def assign_to_node(self, peer: _Peer, name: str) -> None:
        """Record whose request came over a connection.

        If the node has too many connections, the one that has been idle longest is dropped.
        """
        peer.node = name
        peer.active_at = self.now()
        others = [other for other in self._peers if other.node == name and other is not peer]
        if len(others) >= self.limits.max_per_node:
            # one that no request is using, if there is one
            idle = [other for other in others if not other.num_busy]
            idle.sort(key=lambda other: other.active_at)
            self._drop((idle or others)[0])

    def _drop_oldest_stranger(self) -> None:
        """Drop the oldest connection of a stranger, if there is one."""
        for peer in self._peers:
            if not peer.node:
                self._drop(peer)
                return

    async def _sweep(self) -> None:
        """Hang up on strangers after a while, and on nodes that do not finish a request."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = self.now()
            for peer in list(self._peers):
                is_node = bool(peer.node)
                timeout = self.limits.idle_seconds if is_node else self.limits.stranger_seconds
                if not peer.num_busy and now > peer.active_at + timeout:
                    self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        """Close a connection at once, in whatever state it is."""
        self.forget(peer)
        if peer.transport is not None:
            peer.transport.abort()  # type: ignore[attr-defined]
        elif peer.task is not None:
            peer.task.cancel()

    def forget(self, peer: _Peer) -> None:
        """Record that a connection has ended."""
        self._peers.pop(peer, None)


class _HttpProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol, which also reports to the listener that its connection has ended."""

    def __init__(self, peer: _Peer, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config=config, server_state=state, app_state={"peer": peer})
        self._peer = peer

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._peer.listener.forget(self._peer)


def _tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{certificate} and {key} are not a certificate and its key: {error}; make them with: "
            "fedmomentum keys server"
        ) from error
    return context


def _listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets on all addresses that a host name stands for.

    Raises:
        ConfigError: If there are none, or the port is in use.
    """
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # a free port chosen for the first address is also used for the others
            first_port = sockets[0].getsockname()[1] if len(sockets) > 1 else 0
            sock.bind((address[0], port or first_port, *address[2:]))
            sock.listen(LISTEN_BACKLOG)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}; is the port in use, and is this address one of this "
            f"machine's? ({error.strerror})"
        ) from error
    return sockets
