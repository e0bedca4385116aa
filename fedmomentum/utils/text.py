"""Sanitizes outside text for display: one line, bounded, without control characters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

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


def short_repr(value: Any) -> str:
    """Return a value's `repr` for an error message: on one line, truncated if long."""
    return printable(repr(value), 100)


def first_few(texts: Sequence[str], max_shown: int = 5) -> str:
    """Join the first texts by commas, and add how many more there are; empty without texts."""
    shown = ", ".join(texts[:max_shown])
    return f"{shown} and {len(texts) - max_shown} more" if len(texts) > max_shown else shown


def joined_reasons(failures: Mapping[str, str]) -> str:
    """Return why clients gave no usable reply, for an error message: ``a, b: no answer; c: ...``.

    Clients with the same reason are listed together.

    Args:
        failures: Client to the reason.
    """
    clients_by_reason: dict[str, list[str]] = {}
    for client, reason in sorted(failures.items()):
        clients_by_reason.setdefault(reason, []).append(client)
    return "; ".join(
        f"{first_few(clients)}: {reason}" for reason, clients in clients_by_reason.items()
    )
