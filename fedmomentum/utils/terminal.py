"""Received text on the terminal and in logs: one bounded line without control characters.

A client's error text, a category's name or a path may contain escape sequences that change a
terminal's title, line breaks that forge log lines, or a megabyte in one word. Received text is
truncated on receipt (`fedmomentum.utils.schema.printable`); this module is the last line of
defense.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.segment import Segment

from fedmomentum.utils.text import CONTROL_CHARACTERS, REPLACEMENT, printable

MAX_LINE = 2000
"""The most characters per log record; the longest of our own messages have a few hundred."""
MAX_TRACEBACK_LINES = 100
"""How many lines of a traceback to keep, from its end; a recursion error has thousands."""

# Without the line break, which rich itself writes.
_ALL_BUT_LINE_BREAK = CONTROL_CHARACTERS.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f")
_CONTROL = re.compile(f"[{_ALL_BUT_LINE_BREAK}]")


class SafeConsole(Console):
    """A console that replaces control characters in text by U+FFFD.

    Rich's own colors and cursor movements still work.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render with rich, then replace control characters in the text."""
        for segment in super().render(renderable, options):
            is_text = segment.control is None and not segment.text.isprintable()
            if is_text and _CONTROL.search(segment.text):
                yield Segment(_CONTROL.sub(REPLACEMENT, segment.text), segment.style)
            else:
                yield segment


class LineFormatter(logging.Formatter):
    """Formats a record as one line, followed by the lines of a traceback, both sanitized."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line, truncated and without control characters."""
        record.message = printable(record.message, MAX_LINE)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802
        """Return the traceback's last lines, truncated and without control characters."""
        lines = super().formatException(ei).splitlines()  # type: ignore[arg-type]
        return "\n".join(printable(line, MAX_LINE) for line in lines[-MAX_TRACEBACK_LINES:])


@contextmanager
def log_file(file: Path, *, delay: bool = False) -> Iterator[logging.Handler]:
    """Also log to a file within the block, one sanitized line per record.

    Args:
        file: The file, which is appended to if it exists.
        delay: Whether to create it only with its first line.

    Yields:
        The handler that writes to the file.
    """
    handler = logging.FileHandler(file, encoding="utf-8", delay=delay)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("fedmomentum")
    level = logger.level
    logger.addHandler(handler)
    if level != logging.DEBUG:
        logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def log_handler(console: Console) -> logging.Handler:
    """Return a handler that shows log records on a console, without a highlighter.

    Rich's highlighter runs regular expressions over the whole text, which takes quadratic time and
    holds the interpreter lock: a client's error text could block the process for minutes.
    """
    handler = RichHandler(
        console=console,
        show_path=False,
        show_time=False,
        markup=False,
        highlighter=NullHighlighter(),
        keywords=[],
    )
    handler.setFormatter(LineFormatter("%(message)s"))
    return handler


class Throttle(logging.Filter):
    """Passes a burst of records, then a fixed number per second, and reports how many were dropped.

    For library log records that strangers can trigger, which must not fill a disk.

    Args:
        burst: Number of records that may pass at once.
        rate: Records per second after that.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, burst: int, rate: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._burst = burst
        self._rate = rate
        self._clock = clock
        self._allowance = float(burst)
        self._last = clock()
        self._num_dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record may pass."""
        now = self._clock()
        self._allowance = min(self._burst, self._allowance + (now - self._last) * self._rate)
        self._last = now
        if self._allowance < 1:
            self._num_dropped += 1
            return False
        self._allowance -= 1
        if self._num_dropped:
            record.msg = (
                f"{record.getMessage()} ({self._num_dropped} more lines of this kind were dropped)"
            )
            record.args = ()
            self._num_dropped = 0
        return True
