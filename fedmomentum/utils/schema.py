"""Declared types for all received data, and the only way to validate it against them.

JSON that has crossed a trust boundary (a reply, a task, a manifest, a row of metrics, an adapter's
configuration) is decoded directly into a declared type, which rejects unknown keys, wrong types,
NaN, numbers out of range and text longer than declared. msgspec does the work; this module defines
common types and the error messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from fedmomentum.errors import FedMomentumError, PayloadError
from fedmomentum.utils.text import printable

T = TypeVar("T")

MAX_COUNT = 2**53 - 1
"""The largest count that a double, and thus every JSON reader, represents exactly."""
MAX_DEPTH = 8
"""The maximum nesting depth of free-form JSON, such as a PEFT configuration."""
MAX_ITEMS = 200_000
"""The most values in free-form JSON; a large model's `rank_pattern` has thousands of modules."""

MAX_LABELS = 10_000
"""The most labels of a classifier: as many as a client may report scores for."""

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
LARGEST = 1e300
"""Larger numbers overflow in almost any further computation, even in drawing a curve."""
Size = Annotated[float, Meta(ge=0, le=LARGEST)]
"""A norm, a duration or a loss: finite and nonnegative."""
Fraction = Annotated[float, Meta(ge=0, le=1)]
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""A SHA-256 in lower-case hexadecimal."""
Text = Annotated[str, Meta(max_length=4096)]
Label = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
"""A short displayed name, such as a category, version or dtype, without control characters."""
ModulePath = Annotated[
    str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x20\x7f-\x9f]+\Z")
]
"""The dotted path of a module in the base model."""


class Schema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A record with declared fields; unknown fields are rejected."""


def parse_json(
    data: bytes | str, kind: type[T], name: str, error: type[FedMomentumError] = PayloadError
) -> T:
    """Decode JSON text into a declared type.

    Args:
        data: The JSON text, UTF-8.
        kind: The type, such as a `Schema`.
        name: How error messages refer to the text, such as a client or file.
        error: The error to raise.

    Raises:
        FedMomentumError: If the text is not JSON or does not match the type; the message names the
            field.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as problem:
        raise error(f"{name}: {validation_message(problem, _decoded(data))}") from problem
    except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError) as problem:
        raise error(f"{name}: not valid JSON: {problem}") from problem


def validation_message(problem: Exception, value: Any = None) -> str:
    """Return msgspec's message, field first: ``metrics.loss: Expected `float`, got `str` ``.

    Args:
        problem: What msgspec raised.
        value: What it could not convert. Where the message names a bound but not the number that
            is out of it, the number is taken from here: ``r: Expected `int` >= 1; got 0``.
    """
    text, _, path = str(problem).partition(" - at ")
    field = path.replace("`", "").replace("$.", "").replace("$", "")
    # Sanitize it, since an unknown field may have any name.
    message = printable(f"{field}: {text}" if field else text)
    return message + _refused_value(value, text, path)


def _decoded(data: bytes | str) -> Any:
    """Return the value of JSON text whose end may be invalid; None then."""
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None


def _refused_value(value: Any, text: str, path: str) -> str:
    """Return ``; got 3`` if msgspec's message names a bound but not the rejected value."""
    if not path or ", got " in text or "[...]" in path:
        return ""
    try:
        for key, index in re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", path):
            value = value[key] if key else value[int(index)]
    # A key that contains a dot, or a missing field.
    except (LookupError, TypeError):
        return ""
    if isinstance(value, (Mapping, list, tuple)):
        return ""
    return f"; got {printable(repr(value), 80)}"


def check_free_form(
    value: Any,
    name: str,
    error: type[FedMomentumError] = PayloadError,
    max_items: float = MAX_ITEMS,
) -> None:
    """Reject free-form JSON that is nested too deeply, is too large, or has keys that are not text.

    Args:
        value: The value.
        name: How error messages refer to it.
        error: The error to raise.
        max_items: The most values that it may contain.

    Raises:
        FedMomentumError: If the value is nested deeper than `MAX_DEPTH`, contains more than
            `max_items` values, or has a key that is not text.
    """
    remaining = max_items
    level = [value]
    # Iterate level by level to avoid the recursion limit.
    for _ in range(MAX_DEPTH + 1):
        remaining -= len(level)
        if remaining < 0:
            raise error(f"{name} holds more than {max_items} values")
        next_level: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                if not all(isinstance(key, str) for key in item):
                    raise error(f"{name} has a key that is not text")
                next_level.extend(item.values())
            elif isinstance(item, (list, tuple)):
                next_level.extend(item)
        if not next_level:
            return
        level = next_level
    raise error(f"{name} is nested deeper than {MAX_DEPTH} levels")
