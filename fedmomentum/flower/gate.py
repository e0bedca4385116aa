"""The outer check in front of Flower's fleet service: who may send requests, and how many.

It looks only at a request's headers: path, size and signature. Requests that are not signed by an
admitted node go no further, and the rest of them is never read. What admitted nodes send is
validated by the inner check, `guard`.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import Response
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode
from starlette.responses import JSONResponse

from fedmomentum.utils.text import printable
from fedmomentum.web.asgi import App, Event, Receive, Scope, Send

LOG = logging.getLogger("fedmomentum")

KIB = 2**10
MAX_REQUEST_BYTES = 16 * KIB**2
"""The largest request; Flower splits what it sends into parts of 5 MB."""
ACTIVATE_PATH = "/v1/fleet/activate-node"
PATHS: Mapping[str, int] = {
    ACTIVATE_PATH: 4 * KIB,
    "/v1/fleet/deactivate-node": 4 * KIB,
    "/v1/fleet/send-node-heartbeat": 4 * KIB,
    "/v1/fleet/pull-messages": 4 * KIB,
    "/v1/fleet/push-messages": 2 * KIB**2,  # a tree of object ids, or an error's text
    "/v1/fleet/push-object": MAX_REQUEST_BYTES,
    "/v1/fleet/pull-object": 4 * KIB,
    "/v1/fleet/confirm-message-received": 4 * KIB,
}
"""The paths that nodes need, and the largest request that each accepts.

Flower's other paths (self-registration of nodes, runs, code) are answered with "not found".
"""
MAX_KEY_BYTES = 512
"""The longest public key or signature in a header; those of P-384 are under 250 bytes."""
BODY_TIMEOUT_SECONDS = 60.0
"""The longest pause between two pieces of a request's body."""
REQUESTS_PER_SECOND = 200.0
"""Per node; excess requests wait. A node sends a few, and one for each 5 MB part."""
REQUEST_BURST = 400.0
"""Per node; the number of requests that may arrive at once before any has to wait."""
MAX_CONCURRENT_REQUESTS = 16
"""Per node; ours has at most four in progress."""
NOTICE_INTERVAL_SECONDS = 60.0
"""The minimum time between identical log notices about the same node."""
MAX_RECENT_NOTICES = 1000
"""How many notices are remembered; beyond that, nothing is logged until old ones expire."""


class Peer(Protocol):
    """A connection, as the listener knows it."""

    def signed_by(self, name: str) -> None:
        """Record that the connection carried a request of this node."""
        ...

    def busy(self) -> None:
        """Record that a request is being answered."""
        ...

    def idle(self) -> None:
        """Record that a request has been answered."""
        ...


class ThrottledLog:
    """A log about nodes and strangers, rate-limited so that nobody can fill the disk.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged_at: dict[str, float] = {}

    def log(self, level: int, subject: str, text: str, key: str = "") -> None:
        """Log one line, unless one with the same key was logged less than a minute ago.

        Args:
            level: A level of the `logging` module.
            subject: Who the line is about.
            text: What happened.
            key: Identifies equal notices; by default, the subject and the beginning of the text.
        """
        now = self._clock()
        key = key or f"{subject} {text[:40]}"
        if now < self._logged_at.get(key, -math.inf) + NOTICE_INTERVAL_SECONDS:
            return
        if len(self._logged_at) > MAX_RECENT_NOTICES:
            self._forget_before(now - NOTICE_INTERVAL_SECONDS)
            if len(self._logged_at) > MAX_RECENT_NOTICES:
                return
        self._logged_at[key] = now
        LOG.log(level, "%s", printable(f"{subject} {text}", 400))

    def _forget_before(self, time_limit: float) -> None:
        recent = {key: then for key, then in self._logged_at.items() if then > time_limit}
        self._logged_at = recent


@dataclass
class _RequestRate:
    """A token bucket that limits how fast one node sends requests.

    Attributes:
        under_way: Number of requests that have not been answered yet.
        tokens: Number of requests that the node may make at once.
        updated_at: When `tokens` was computed.
    """

    under_way: int = 0
    tokens: float = REQUEST_BURST
    updated_at: float = 0.0

    def delay(self, now: float) -> float:
        """Take a token, and return how many seconds the request must wait for it."""
        refilled = self.tokens + (now - self.updated_at) * REQUESTS_PER_SECOND
        self.tokens = min(REQUEST_BURST, refilled) - 1
        self.updated_at = now
        return max(0.0, -self.tokens / REQUESTS_PER_SECOND)


@dataclass(frozen=True)
class _SignedRequest:
    """A request with valid headers: the node that signed it and the size of its body."""

    name: str
    length: int


class Gate:
    """ASGI middleware that only forwards well-formed requests signed by an admitted node.

    Args:
        app: The application behind it.
        name_of: Returns the name of the admitted node with this public key (PEM), or None.
        on_refusal: Called as `on_refusal(name, reason)` if a node's request is too large.
        notices: Log for the operator.
    """

    def __init__(
        self,
        app: App,
        name_of: Callable[[bytes], str | None],
        on_refusal: Callable[[str, str], None],
        notices: ThrottledLog,
    ) -> None:
        self._app = app
        self._name_of = name_of
        self._on_refusal = on_refusal
        self._notices = notices
        self._rates: dict[str, _RequestRate] = defaultdict(_RequestRate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request or forward it."""
        request = self._authenticate(scope)
        if isinstance(request, Response):
            response: Response | None = request
        else:
            response = await self._forward(request, scope, receive, send)
        if response is not None:
            # close a connection on its first refused request
            response.headers["connection"] = "close"
            await response(scope, receive, send)

    def _authenticate(self, scope: Scope) -> _SignedRequest | Response:
        """Check path, headers, signature and size; return the signed request, or a refusal."""
        # what no node requests is "not found"
        if scope["type"] != "http" or scope["path"] not in PATHS or scope["method"] != "POST":
            return Response(status_code=404)
        headers = _unique_headers(scope)
        if headers is None:
            return Response(status_code=400)
        # without a valid signature, the answer must not reveal who is admitted
        signer = _signer(headers)
        length = _content_length(headers)
        if signer is None:
            is_too_large = length is None or length > MAX_REQUEST_BYTES
            return Response(status_code=413) if is_too_large else _unsigned_response()

        # the signature is valid, but is the signer admitted?
        name = self._name_of(signer)
        if name is None:
            key_hash = hashlib.sha256(signer).hexdigest()[:16]
            text = f"asked to join; its public key, as PEM, has the SHA-256 {key_hash}..."
            subject = "a node that is not admitted"
            self._notices.log(logging.WARNING, subject, text, key="stranger")
            return _not_admitted() if scope["path"] == ACTIVATE_PATH else _unsigned_response()

        # report the oversized request to the operator, and to the node's open task
        limit = PATHS[scope["path"]]
        if length is None or length > limit:
            size = "no stated size" if length is None else f"{length} bytes"
            reason = f"its request has {size}; {scope['path']} takes at most {limit}"
            self._notices.log(logging.WARNING, name, f"was refused: {reason}")
            self._on_refusal(name, reason)
            return Response(status_code=413)
        return _SignedRequest(name, length)

    async def _forward(
        self, request: _SignedRequest, scope: Scope, receive: Receive, send: Send
    ) -> Response | None:
        """Forward a signed request at its node's rate; return a refusal if it was not answered."""
        # refuse a node that floods the server before reading any of its request
        peer: Peer | None = scope.get("state", {}).get("peer")
        rate = self._rates[request.name]
        if rate.under_way >= MAX_CONCURRENT_REQUESTS:
            return Response(status_code=429)
        if peer is not None:
            peer.signed_by(request.name)
            peer.busy()
        has_begun = False

        async def send_and_record(event: Event) -> None:
            nonlocal has_begun
            has_begun = True
            await send(event)

        # wait for a token, read the body and let Flower answer
        rate.under_way += 1
        try:
            await asyncio.sleep(rate.delay(time.monotonic()))
            body = await _read_body(receive, request.length)
            if body is None:
                return Response(status_code=408)
            await self._app(scope, _replay(body, receive), send_and_record)
        except Exception as error:
            # whatever a request causes, the service must carry on
            text = f"sent a request that failed: {type(error).__name__}"
            self._notices.log(logging.WARNING, request.name, text)
            return None if has_begun else Response(status_code=500)
        finally:
            rate.under_way -= 1
            if peer is not None:
                peer.idle()
        return None


_UNIQUE_HEADERS = frozenset(
    (
        b"content-type",
        b"content-length",
        b"transfer-encoding",
        b"host",
        FLEET_HTTP_PUBLIC_KEY_HEADER.encode(),
        FLEET_HTTP_SIGNATURE_HEADER.encode(),
        TIMESTAMP_HEADER.encode(),
    )
)
"""The headers that are evaluated; each may occur only once."""


def _unique_headers(scope: Scope) -> dict[bytes, bytes] | None:
    """Return the relevant headers; None if one is repeated, since parsers may then disagree."""
    headers: dict[bytes, bytes] = {}
    for key, value in scope["headers"]:
        if key in _UNIQUE_HEADERS:
            # a repeated header
            if key in headers:
                return None
            headers[key] = value
    return headers


def _content_length(headers: Mapping[bytes, bytes]) -> int | None:
    """Return the stated body length, which the server enforces; None if there is none."""
    text = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not text.isdigit() or len(text) > 12:
        return None
    return int(text)


def _signer(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return the public key (PEM) that signed the request in the last few minutes, or None."""
    try:
        pem = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
        if len(pem) > MAX_KEY_BYTES or len(signature) > MAX_KEY_BYTES:
            return None
        # an old signature may be a replay
        timestamp = headers[TIMESTAMP_HEADER.encode()].decode("ascii")
        signed_at = datetime.datetime.fromisoformat(timestamp)
        age = (datetime.datetime.now(datetime.UTC) - signed_at).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return None
        # accept only the type of key that nodes have
        key = serialization.load_pem_public_key(pem)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return None
        key.verify(signature, timestamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except (
        KeyError,
        ValueError,
        TypeError,
        OverflowError,
        binascii.Error,
        UnsupportedAlgorithm,
        InvalidSignature,
    ):
        return None
    return pem


async def _read_body(receive: Receive, length: int) -> bytes | None:
    """Read the entire body; return None if it stops arriving or is longer than stated."""
    body = bytearray()
    while True:
        try:
            event = await asyncio.wait_for(receive(), BODY_TIMEOUT_SECONDS)
        except TimeoutError:
            return None
        if event["type"] != "http.request":
            return None
        body += event.get("body", b"")
        if len(body) > length:
            return None
        if not event.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body already read, then the events that follow."""
    events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Event:
        return events.pop() if events else await receive()

    return replay


def _unsigned_response() -> Response:
    """Return Flower's answer to a request without a valid signature."""
    return JSONResponse({"detail": "Invalid SuperNode authentication"}, status_code=401)


def _not_admitted() -> Response:
    """Return Flower's answer to a node that it does not know."""
    code = int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
    return JSONResponse({"code": code, "detail": "This node is not admitted."}, status_code=403)
