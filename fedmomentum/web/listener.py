"""A port for HTTP: hundreds of connections cost its process little, no matter who opens them.

uvicorn speaks HTTP on each connection. It does not limit the number of connections or the duration
of a TLS handshake, nor does it hang up on clients that never finish a request; therefore
connections are accepted here and handed to uvicorn one by one.

A connection is a stranger's until a request that the application accepts has come over it (of the
federation's server: one that is signed by an admitted node). Strangers' connections are limited in
number, in total and from one address, and in duration. A new one displaces the oldest, so that
others get in however many are open. Together with theirs they stay far below the process's limit of
open files: a run always has the files it needs for its checkpoints.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import ServerState

from fedmomentum.errors import ConfigError
from fedmomentum.web.asgi import App
from fedmomentum.web.limits import ConnectionLimits, default_limits

LOG = logging.getLogger("fedmomentum")
ACCEPT_PAUSE_SECONDS = 0.5
"""How long accepting pauses when the process has no more files or memory for sockets."""
SWEEP_SECONDS = 1.0
"""How often connections are checked for their time limits."""
LISTEN_BACKLOG = 512
"""Connections that the kernel queues; a burst of strangers must not keep a node out."""


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

    def hang_up(self) -> None:
        self.listener.drop(self)

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
        tls: For TLS, the server's certificate and key; without it, plain HTTP is spoken.
        limits: How many connections there may be; by default, see `default_limits`.

    Raises:
        ConfigError: If the port cannot be opened.
    """

    def __init__(
        self,
        app: App,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self.limits = limits or default_limits()
        self.host = host
        self._port = port
        self._tls = tls
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

    def addresses(self) -> list[str]:
        """Return the addresses it listens on."""
        return [str(sock.getsockname()[0]) for sock in self._sockets]

    def call(self, work: Coroutine[Any, Any, None], timeout: float) -> None:
        """Run a coroutine in the listener's thread, and wait for it.

        Raises:
            TimeoutError: If it takes longer than `timeout` seconds.
        """
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

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
            self.drop(peer)
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
            self.drop(from_address[0])
        elif len(strangers) >= limits.max_strangers:
            # the address with most connections gives up its oldest, so that one address cannot
            # displace all others
            counts = Counter(peer.address for peer in strangers)
            busiest = counts.most_common(1)[0][0]
            self.drop(next(peer for peer in strangers if peer.address == busiest))
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
                ssl_handshake_timeout=self.limits.handshake_seconds if self._tls else None,
                ssl_shutdown_timeout=5.0 if self._tls else None,
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
            self.drop((idle or others)[0])

    def _drop_oldest_stranger(self) -> None:
        """Drop the oldest connection of a stranger, if there is one."""
        for peer in self._peers:
            if not peer.node:
                self.drop(peer)
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
                    self.drop(peer)

    def drop(self, peer: _Peer) -> None:
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
