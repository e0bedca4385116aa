"""Values as TOML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_value(value: Any) -> str:
    """Return a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        pairs = [f"{quote(name)} = {format_value(item)}" for name, item in value.items()]
        return "{" + ", ".join(pairs) + "}"
    return repr(value)


def quote(text: str) -> str:
    """Return a text as a basic TOML string, control characters escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(_escape_control(character) for character in escaped) + '"'


def _escape_control(character: str) -> str:
    is_control = ord(character) < 32 or ord(character) == 127
    return f"\\u{ord(character):04x}" if is_control else character
