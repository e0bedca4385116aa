"""The updates for viewers, made once for all of them and only while there are any."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmomentum.report.live_page import LivePage, LiveUpdate

POLL_SECONDS = 1.0
"""How often to read the files while there are viewers."""
LEAVE_SECONDS = 10.0
"""How long the final update may take to reach all viewers."""


class Feed:
    """The updates of a page for its viewers, for use in a single event loop.

    Args:
        page: Makes the updates.
    """

    def __init__(self, page: LivePage) -> None:
        self._page = page
        self._update: LiveUpdate | None = None
        self._made_at = float("-inf")
        self._lock = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.num_viewers = 0
        self.has_ended = False

    async def current(self) -> LiveUpdate:
        """Return the current update, remade if it is older than `POLL_SECONDS`."""
        async with self._lock:
            is_due = time.monotonic() >= self._made_at + POLL_SECONDS
            if self._update is None or (is_due and not self.has_ended):
                # Drawing takes a moment, so keep answering others meanwhile.
                self._update = await asyncio.to_thread(self._page.update)
                self._made_at = time.monotonic()
            return self._update

    def page(self, update: LiveUpdate) -> str:
        """Return the whole page."""
        return self._page.page(update)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count a viewer within the block; files are read while there is at least one."""
        self.num_viewers += 1
        if self._polling is None:
            self._polling = asyncio.ensure_future(self._poll())
        try:
            yield
        finally:
            self.num_viewers -= 1

    async def changed(self) -> None:
        """Wait until there may be something new."""
        await self._changed.wait()

    async def _poll(self) -> None:
        """Read the files while there are viewers."""
        while self.num_viewers and not self.has_ended:
            await asyncio.sleep(POLL_SECONDS)
            with contextlib.suppress(Exception):
                await self.current()  # a waiting viewer calls this again and gets the error
            self._wake()
        self._polling = None

    def _wake(self) -> None:
        """Wake all waiting viewers."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def end(self) -> None:
        """Send all viewers the end of the run and wait until they have received it."""
        if not self.num_viewers:
            return
        # Read the files one last time, including the report.
        async with self._lock:
            self._update = await asyncio.to_thread(self._page.update, is_ended=True)
            self.has_ended = True
        self._wake()
        # Streams end once their viewers have received everything.
        end = time.monotonic() + LEAVE_SECONDS
        while self.num_viewers and time.monotonic() < end:
            await asyncio.sleep(0.05)
