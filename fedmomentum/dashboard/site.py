"""The read-only site: the page, its style and script, and the stream of updates.

It serves at most `MAX_VIEWERS` streams. If a viewer does not accept data for `SEND_SECONDS`, its
connection is closed, whatever it requested.
"""

from __future__ import annotations

import asyncio
import json
import logging

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route, Router

from fedmomentum.dashboard.access import Access
from fedmomentum.dashboard.feed import Feed
from fedmomentum.report.live_page import LivePage
from fedmomentum.web.asgi import Event, Receive, Scope, Send
from fedmomentum.web.limits import ConnectionLimits

LOG = logging.getLogger("fedmomentum")
MAX_VIEWERS = 16
"""The most concurrent update streams; each viewer has one."""
SEND_SECONDS = 20.0
"""How long a viewer may take to receive one piece of data."""
TICK_SECONDS = 15.0
"""The longest time between messages, so that both sides know that the other is alive."""
LIMITS = ConnectionLimits(
    max_connections=96, max_strangers=32, max_per_address=32, max_per_node=64, idle_seconds=30.0
)
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Site:
    """Answers authorized requests (ASGI).

    Args:
        page: Makes the page.

    Attributes:
        access: Decides who may see it; None before the port is known, when nobody may.
        feed: The updates for viewers.
    """

    def __init__(self, page: LivePage) -> None:
        self.access: Access | None = None
        self.feed = Feed(page)
        # Static responses are created only once.
        style = Response(page.style(), media_type="text/css")
        script = Response(page.script(), media_type="text/javascript")
        self._router = Router(
            routes=[
                Route("/", self._page),
                Route("/style.css", style),
                Route("/live.js", script),
                Route("/favicon.ico", Response(status_code=204)),
                Route("/events", self._stream),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse a request; hang up on a client that does not accept the answer."""
        if scope["type"] != "http":
            return
        # The listener's view of the connection.
        peer = scope["state"]["peer"]
        refusal = self._refuse(scope)

        async def send_in_time(event: Event) -> None:
            if event["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                event["headers"] = [*event.get("headers", []), *added]
            await asyncio.wait_for(send(event), SEND_SECONDS)

        if refusal is not None:
            # Close a connection on its first refused request, unless it is a redirect.
            if refusal.status_code != 303:
                refusal.headers["connection"] = "close"
        else:
            peer.signed_by("viewers")
        # Mark the connection as busy, so that it is not considered idle.
        peer.busy()
        try:
            await (refusal or self._router)(scope, receive, send_in_time)
        except TimeoutError:
            LOG.debug("a viewer does not read what it asked for")
            peer.hang_up()
        finally:
            peer.idle()

    def _refuse(self, scope: Scope) -> Response | None:
        if self.access is None:
            return PlainTextResponse("Not yet.\n", 503)
        return self.access.refuse(scope)

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(self.feed.page(await self.feed.current()))

    async def _stream(self, request: Request) -> Response:
        if self.feed.num_viewers >= MAX_VIEWERS:
            return PlainTextResponse(f"{MAX_VIEWERS} pages are watching already.\n", 503)
        return _Updates(self.feed)


class _Updates(Response):
    """Changed parts of the page as server-sent events, until either side ends the stream."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(headers={"connection": "close"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send updates, and only ticks while nothing changes."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        has_left = asyncio.ensure_future(_wait_for_end(receive))
        with self._feed.watching():
            try:
                await send(start)
                await self._send_updates(send, has_left)
                if not has_left.done():
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                has_left.cancel()

    async def _send_updates(self, send: Send, has_left: asyncio.Future[None]) -> None:
        shown: dict[str, str] = {}
        while not has_left.done():
            # Send only the parts that differ from what this viewer has.
            update = await self._feed.current()
            parts = {name: html for name, html in update.parts.items() if shown.get(name) != html}
            shown = update.parts
            if parts:
                facts = {"parts": parts, "title": update.title, "spoken": update.spoken}
                await send(_event("update", {**facts, "now": update.now}))
            if self._feed.has_ended:
                await send(_event("end", {}))
                return
            # Wait for the next read of the files, or for the viewer to leave.
            changed = asyncio.ensure_future(self._feed.changed())
            done, _ = await asyncio.wait(
                {changed, has_left}, timeout=TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            changed.cancel()
            if not done:
                await send(_event("tick", {}))


def _event(kind: str, content: dict[str, object]) -> Event:
    """Format an event; its JSON is always a single line."""
    text = f"event: {kind}\ndata: {json.dumps(content)}\n\n"
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


async def _wait_for_end(receive: Receive) -> None:
    """Wait until the viewer has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
