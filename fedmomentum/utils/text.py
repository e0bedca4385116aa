"""Text from outside as it may be shown: one line, bounded, without control characters."""

from __future__ import annotations

import re

CONTROL_CHARACTERS = (
    "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"
)
"""What is never shown, as a class of a regular expression.

Control characters (they move cursors, set titles, forge lines of a log), line and paragraph
separators, direction overrides, lone surrogates and noncharacters.
"""
REPLACEMENT = "\ufffd"

_CONTROL = re.compile(f"[{CONTROL_CHARACTERS}]")


def printable(text: str, max_length: int = 500) -> str:
    """Return received text as it may be shown and logged: one line, cut to a length.

    `CONTROL_CHARACTERS` are replaced by U+FFFD.
    """
    shown = text if len(text) <= max_length else text[: max_length - 1] + "…"
    return _CONTROL.sub(REPLACEMENT, shown)
