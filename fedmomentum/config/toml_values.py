"""Keys and values as TOML, in files and on the command line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from fedmomentum.errors import ConfigError
from fedmomentum.utils.text import printable

# One part of a dotted key, which may be quoted, and what follows it.
_KEY_PART = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[^.=]*?)\s*(\.|=|\Z)""", re.DOTALL)


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


def parse_value(text: str) -> Any:
    """Return a value given on the command line: TOML, or the text itself where it is not TOML.

    So `method.name=fedit` needs no quotes.
    """
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A line break in the text may have started a second key.
    return table["value"] if table.keys() == {"value"} else text


def split_setting(text: str) -> tuple[list[str], str | None]:
    """Split `section.key=value` into the parts of the key, and the value as it was written.

    As in TOML, a part with a dot or an equals sign is written in quotes.

    >>> split_setting('data.client-files."north.eu"=north.jsonl')
    (['data', 'client-files', 'north.eu'], 'north.jsonl')

    Returns:
        The parts; and the value, or None without an equals sign.
    """
    names = []
    position = 0
    follows = "."
    while follows == ".":
        found = _KEY_PART.match(text, position)
        assert found is not None  # even an empty part matches
        name, follows = found.groups()
        names.append(str(parse_value(name)) if name[:1] in ("'", '"') else name)
        position = found.end()
    return names, text[position:] if follows == "=" else None


def split_outside(text: str, separator: str) -> list[str]:
    """Split a text at a character, except within quotes and brackets.

    >>> split_outside('fedit,fedit:lora.target-modules=["q_proj","v_proj"]', ",")
    ['fedit', 'fedit:lora.target-modules=["q_proj","v_proj"]']

    Raises:
        ConfigError: If a quote or a bracket is not closed, or not opened.
    """
    parts, start, num_open, quoted_by, is_escaped = [], 0, 0, "", False
    for index, character in enumerate(text):
        if quoted_by:
            if character == quoted_by and not is_escaped:
                quoted_by = ""
            is_escaped = character == "\\" and quoted_by == '"' and not is_escaped
        elif character in "\"'":
            quoted_by = character
        elif character in "[({":
            num_open += 1
        elif character in "])}":
            num_open -= 1
        elif character == separator and not num_open:
            parts.append(text[start:index])
            start = index + 1
    if quoted_by or num_open:
        raise ConfigError(
            f"a quote or a bracket is not closed in {printable(repr(text))}; close it, and put a "
            "text that contains one in quotes"
        )
    return [*parts, text[start:]]
