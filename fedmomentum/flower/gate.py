"""The first door before Flower's fleet service: who may ask, and how much.

It looks at a request's headers alone: path, size and signature. Whoever is not admitted gets no further, and nothing
else of their request is read. What an admitted node asks is looked at behind the second door, `guard`.
"""

from __future__ import annotations

import asyncio
import binascii
import datetime
import hashlib
import logging
import math
import time
from base64 import b64decode
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import Response
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode
from starlette.responses import JSONResponse

from fedmomentum.schema import printable

LOG = logging.getLogger("fedmomentum")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KIB = 2**10
MAX_REQUEST_BYTES = 16 * KIB**2
"""Flower cuts what it sends into parts of 5 MB."""
ACTIVATE = "/v1/fleet/activate-node"
PATHS: Mapping[str, int] = {
    ACTIVATE: 4 * KIB,
    "/v1/fleet/deactivate-node": 4 * KIB,
    "/v1/fleet/send-node-heartbeat": 4 * KIB,
    "/v1/fleet/pull-messages": 4 * KIB,
    "/v1/fleet/push-messages": 2 * KIB**2,  # a tree of names, or an error's text
    "/v1/fleet/push-object": MAX_REQUEST_BYTES,
    "/v1/fleet/pull-object": 4 * KIB,
    "/v1/fleet/confirm-message-received": 4 * KIB,
}
"""All that a node needs, and how large a request each takes.

What else Flower's router offers (nodes that register themselves, runs, code) is not found.
"""
MAX_KEY_BYTES = 512
PAUSE_SECONDS = 60.0
"""Longest pause between two pieces of a request's body."""
REQUESTS_PER_SECOND = 200.0
"""Of one node; what comes faster waits. An honest one sends a few, and one for each part of 5 MB."""
REQUEST_BURST = 400.0
REQUESTS_AT_ONCE = 16
"""Of one node; an honest one has four under way at most."""
TOLD_AGAIN_SECONDS = 60.0
"""A node's name comes into the log no more often than this for one and the same thing."""


class Peer(Protocol):
    """A connection, as the listener knows it."""

    def signed_by(self, name: str) -> None:
        """Note that a request of this node came over the connection."""
        ...

    def busy(self) -> None:
        """Note that a request is being answered."""
        ...

    def idle(self) -> None:
        """Note that it has been."""
        ...


class Notices:
    """Log lines about nodes and strangers, so few that nobody can fill a disk with them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}

    def tell(self, level: int, who: str, text: str, key: str = "") -> None:
        """Log one line, unless one was logged less than a minute ago for the same key; without one, who and text."""
        now = self._clock()
        line = f"{who} {text}"
        key = key or f"{who} {text[:40]}"
        if now < self._last.get(key, -math.inf) + TOLD_AGAIN_SECONDS:
            return
        if len(self._last) > 1000:
            self._last = {known: then for known, then in self._last.items() if now < then + TOLD_AGAIN_SECONDS}
            if len(self._last) > 1000:
                return
        self._last[key] = now
        LOG.log(level, "%s", printable(line, 400))


class Gate:
    """Let in requests of the form that nodes make, signed by an admitted node; an ASGI middleware.

    Args:
        app: What lies behind.
        name_of: The name of the admitted node with this public key (PEM), or None.
        refuse: Told that a node's request was refused for its size: `refuse(name, reason)`.
        notices: Takes what the operator should know.
    """

    def __init__(
        self,
        app: App,
        name_of: Callable[[bytes], str | None],
        refuse: Callable[[str, str], None],
        notices: Notices,
    ) -> None:
        self._app = app
        self._name_of = name_of
        self._refuse = refuse
        self._notices = notices
        self._pace: dict[str, _Pace] = defaultdict(_Pace)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        response = await self._answer(scope, receive, send)
        if response is not None:
            response.headers["connection"] = "close"  # one refused request a connection
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Return the refusal, or None if the request was passed on and answered."""
        if scope["type"] != "http" or scope["path"] not in PATHS or scope["method"] != "POST":
            return Response(status_code=404)
        headers = _single_headers(scope)
        if headers is None:
            return Response(status_code=400)
        signer = _signer(headers)
        length = _length(headers)
        if signer is None:
            too_large = length is None or length > MAX_REQUEST_BYTES
            return Response(status_code=413) if too_large else _unsigned()
        name = self._name_of(signer)
        if name is None:
            key = hashlib.sha256(signer).hexdigest()[:16]
            text = f"asked to join; its public key, as PEM, has the SHA-256 {key}..."
            self._notices.tell(logging.WARNING, "a node that is not admitted", text, key="stranger")
            return _not_admitted() if scope["path"] == ACTIVATE else _unsigned()
        if length is None or length > PATHS[scope["path"]]:
            reason = f"its request has {'no stated size' if length is None else f'{length} bytes'}; {scope['path']} "
            reason += f"takes at most {PATHS[scope['path']]}"
            self._notices.tell(logging.WARNING, name, f"was refused: {reason}")
            self._refuse(name, reason)
            return Response(status_code=413)

        peer: Peer | None = scope.get("state", {}).get("peer")
        pace = self._pace[name]
        if pace.under_way >= REQUESTS_AT_ONCE:
            return Response(status_code=429)
        if peer is not None:
            peer.signed_by(name)
            peer.busy()
        has_begun = False

        async def noting_send(event: MutableMapping[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(event)

        pace.under_way += 1
        try:
            await asyncio.sleep(pace.wait(time.monotonic()))
            body = await _body(receive, length)
            if body is None:
                return Response(status_code=408)
            await self._app(scope, _replay(body, receive), noting_send)
        except Exception as error:  # whatever a request causes, the service goes on
            self._notices.tell(logging.WARNING, name, f"sent a request that failed: {type(error).__name__}")
            return None if has_begun else Response(status_code=500)
        finally:
            pace.under_way -= 1
            if peer is not None:
                peer.idle()
        return None


@dataclass
class _Pace:
    """How fast a node asks.

    Attributes:
        under_way: Its requests that have no answer yet.
        left: Requests that it may make at once.
        last: When that was reckoned.
    """

    under_way: int = 0
    left: float = REQUEST_BURST
    last: float = 0.0

    def wait(self, now: float) -> float:
        """Return how long the next request has to wait."""
        self.left = min(REQUEST_BURST, self.left + (now - self.last) * REQUESTS_PER_SECOND)
        self.last = now
        self.left -= 1
        return max(0.0, -self.left / REQUESTS_PER_SECOND)


_NEEDED = (
    b"content-type",
    FLEET_HTTP_PUBLIC_KEY_HEADER.encode(),
    FLEET_HTTP_SIGNATURE_HEADER.encode(),
    TIMESTAMP_HEADER.encode(),
)
_SINGLE = frozenset((*_NEEDED, b"content-length", b"transfer-encoding", b"host"))


def _single_headers(scope: Scope) -> dict[bytes, bytes] | None:
    """Return the headers that count; None if one of them comes twice, for then two readers may read two things."""
    found: dict[bytes, bytes] = {}
    for key, value in scope["headers"]:
        if key in _SINGLE:
            if key in found:
                return None
            found[key] = value
    return found


def _length(headers: Mapping[bytes, bytes]) -> int | None:
    """Return the stated length of the body; the server holds a body to it."""
    text = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not text.isdigit() or len(text) > 12:
        return None
    return int(text)


def _signer(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return the public key (PEM) that signed the request within the last minutes; None if none did."""
    try:
        pem, signature = (
            b64decode(headers[name.encode()], validate=True)
            for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
        )
        if len(pem) > MAX_KEY_BYTES or len(signature) > MAX_KEY_BYTES:
            return None
        timestamp = headers[TIMESTAMP_HEADER.encode()].decode("ascii")
        signed = datetime.datetime.fromisoformat(timestamp)
        age = (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return None
        key = serialization.load_pem_public_key(pem)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return None
        key.verify(signature, timestamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except (KeyError, ValueError, TypeError, OverflowError, binascii.Error, UnsupportedAlgorithm, InvalidSignature):
        return None
    return pem


async def _body(receive: Receive, length: int) -> bytes | None:
    """Return the whole body; None if it stops coming."""
    parts = bytearray()
    while True:
        try:
            event = await asyncio.wait_for(receive(), PAUSE_SECONDS)
        except TimeoutError:
            return None
        if event["type"] != "http.request":
            return None
        parts += event.get("body", b"")
        if len(parts) > length:
            return None
        if not event.get("more_body", False):
            return bytes(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, then whatever comes after it."""
    events: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return events.pop() if events else await receive()

    return replay


def _unsigned() -> Response:
    """Return Flower's answer to a request whose signature counts for nothing."""
    return JSONResponse({"detail": "Invalid SuperNode authentication"}, status_code=401)


def _not_admitted() -> Response:
    """Return Flower's answer to a node that it does not know."""
    code = int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
    return JSONResponse({"code": code, "detail": "This node is not admitted."}, status_code=403)
