"""Sanitizes outside text for display: one line, bounded, without control characters."""

from __future__ import annotations

import re

CONTROL_CHARACTERS = (
    "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"
)
"""Characters that are never displayed, as a regular expression character class.

Control characters (which move cursors, set titles, forge log lines), line and paragraph separators,
direction overrides, lone surrogates and noncharacters.
"""
REPLACEMENT = "\ufffd"

_CONTROL = re.compile(f"[{CONTROL_CHARACTERS}]")


def printable(text: str, max_length: int = 500) -> str:
    """Sanitize received text for display and logs: one line, truncated to a length.

    `CONTROL_CHARACTERS` are replaced by U+FFFD.
    """
    shown = text if len(text) <= max_length else text[: max_length - 1] + "…"
    return _CONTROL.sub(REPLACEMENT, shown)
