"""What is shown and logged of text from outside: one line, truncated, no control characters, fast."""

import io
import logging
import time

import pytest
from rich.table import Table
from rich.text import Text

from fedmomentum.cli.options import ERR, OUT
from fedmomentum.utils.terminal import MAX_LINE, LineFormatter, SafeConsole, Throttle, log_handler

NASTY = "a\x1b]0;owned\x07b\x1b[2Jc\x00d\x9b31me\u202ef\u2028g\rh\x08i"
CLEAN = "a\ufffd]0;owned\ufffdb\ufffd[2Jc\ufffdd\ufffd31me\ufffdf\ufffdg\ufffdh\ufffdi"


@pytest.fixture
def console():
    return SafeConsole(
        file=io.StringIO(),
        highlight=False,
        width=200,
        force_terminal=True,
        color_system="truecolor",
    )


def test_the_consoles_of_the_command_line_are_safe():
    assert isinstance(OUT, SafeConsole) and isinstance(ERR, SafeConsole)


def test_a_console_shows_no_control_characters_but_its_own(console):
    table = Table("name", title=Text(NASTY))
    table.add_row(Text(NASTY, style="red"))
    console.print(table)
    console.print(NASTY, markup=False)
    shown = console.file.getvalue()
    assert "\x1b[31m" in shown  # rich's own color
    for character in "\x07\x00\x9b\u202e\u2028\x08":
        assert character not in shown
    assert "\x1b]" not in shown and "\x1b[2J" not in shown and "\ufffd[2J" in shown
    assert shown.count("\n") == 8  # title, frame, head, line, two of the row, frame; and the text


def records(handler, level, *args, exc_info=None):
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.log(level, *args, exc_info=exc_info)


def test_a_log_line_is_one_line_without_control_characters():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    records(handler, logging.WARNING, "north: %s", f"{NASTY}\n2026-01-01 INFO forged")
    assert stream.getvalue() == f"WARNING north: {CLEAN}\ufffd2026-01-01 INFO forged\n"
    stream.truncate(0)
    records(handler, logging.WARNING, "%s", "x" * 10**6)
    assert len(stream.getvalue().strip("\0")) < MAX_LINE + 20


def test_a_traceback_is_cut_line_by_line():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(message)s"))
    try:
        raise ValueError(f"{NASTY}\n{'x' * 10**6}")
    except ValueError as error:
        records(
            handler, logging.ERROR, "failed", exc_info=(type(error), error, error.__traceback__)
        )
    lines = stream.getvalue().splitlines()
    assert (
        lines[0] == "failed"
        and lines[1].startswith("Traceback")
        and f"ValueError: {CLEAN}"[:20] in "".join(lines)
    )
    assert max(map(len, lines)) <= MAX_LINE and "\x1b" not in stream.getvalue()


def test_a_megabyte_is_shown_quickly(console):
    """Rich's highlighter would take minutes, in which no other thread runs."""
    handler = log_handler(console)
    # The processor time of this process: a busy machine does not count.
    started = time.process_time()
    for text in ("1 " * 500_000, "a=" * 500_000, "/" * 10**6, "[" * 10**6, "'" * 10**6):
        records(handler, logging.WARNING, "%s", text)
    assert time.process_time() - started < 10
    assert len(console.file.getvalue()) < 5 * 2 * MAX_LINE


def test_a_flood_of_lines_is_dropped_and_counted():
    now = [0.0]
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Throttle(burst=3, rate=0.5, clock=lambda: now[0]))
    for number in range(10):
        records(handler, logging.WARNING, "line %d", number)
    now[0] = 2.0
    records(handler, logging.WARNING, "later")
    assert stream.getvalue().splitlines() == [
        "line 0",
        "line 1",
        "line 2",
        "later (7 more lines of this kind were dropped)",
    ]
