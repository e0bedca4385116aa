"""Rows of JSON files: a list, one object per line, or a list for each client.

Unused columns are parsed but not validated.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmomentum.errors import DataError
from fedmomentum.utils.names import check_client_name
from fedmomentum.utils.text import printable

MAX_INTEGER_DIGITS = 4000
"""The most digits of an integer; Python refuses to parse more than 4,300."""


SPLIT_NAMES = frozenset(
    ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "all")
)
"""Keys that name splits of a data set rather than clients."""


class JsonObject(dict[str, Any]):
    """A JSON object that remembers repeated keys, of which only the last value is kept."""

    repeated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class JsonRows:
    """The contents of a JSON file.

    Attributes:
        objects: The rows.
        kind: The file's format, for messages.
        lines: The line number of each row if there are blank lines in between; otherwise None.
        owners: The client of each row if the file has a list for each client; otherwise None.
    """

    objects: list[JsonObject]
    kind: str
    lines: list[int] | None = None
    owners: list[str] | None = None


def json_rows(path: Path, text: str, row_columns: Collection[str]) -> JsonRows:
    """Parse the objects of a JSON file: a list, one per line, or a list for each client.

    Args:
        path: The file, for error messages.
        text: Its content.
        row_columns: Column names: an object with any of these keys is a row, not a table of
            clients.

    Raises:
        DataError: If the text is something else; the message names the line or the row.
    """
    start = text.lstrip()[:1]
    if start == "[":
        return JsonRows(_json_list(path, text), "JSON, a list of objects")
    single = _single_object(path, text) if start == "{" else None
    if single is None:
        return _json_lines(path, text)
    if _is_by_client(single, row_columns):
        return _client_rows(path, single)
    is_line = "\n" not in text.strip()
    return JsonRows([single], "JSON Lines" if is_line else "JSON, one object")


def json_column(path: Path, rows: Sequence[JsonObject], name: str) -> Iterator[Any]:
    """Yield the values of one column; None for rows that do not have it.

    Raises:
        DataError: If a row has the column twice, or its value has a key twice; the message names
            the row.
    """
    for number, row in enumerate(rows, start=1):
        repeated = name if name in row.repeated else _repeated_key(row.get(name))
        if repeated is not None:
            key = printable(repr(repeated), 60)
            raise DataError(
                f"{path}, row {number}: column {name!r}: the key {key} comes twice in one object, "
                "and only the last value would count; keep one"
            )
        yield row.get(name)


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the column names of all rows, in order of first occurrence."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return list(names)


def _repeated_key(value: Any) -> str | None:
    """Return a key that occurs more than once in an object anywhere in the value."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, JsonObject):
            if item.repeated:
                return min(item.repeated)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return None


def _json_list(path: Path, text: str) -> list[JsonObject]:
    """Parse a JSON list of objects."""
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg}{_hint(error)}"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: not usable JSON: lists or objects are nested too deep") from None
    for number, value in enumerate(values, start=1):
        _check_object(value, f"{path}, row {number}")
    return list(values)


def _json_lines(path: Path, text: str) -> JsonRows:
    """Parse a file with one object per line; blank lines are skipped."""
    objects = []
    lines = []
    # Only \n ends a line: JSON strings may contain other characters that str.splitlines treats
    # as line breaks.
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = _parse(line)
        except json.JSONDecodeError as error:
            is_lines_only = any(ending in path.name.lower() for ending in (".jsonl", ".ndjson"))
            alternative = "" if is_lines_only else ", or a list of objects"
            raise DataError(
                f"{where}: not valid JSON: {error.msg}{_hint(error)}; wanted one object a "
                f"line{alternative}"
            ) from None
        except RecursionError:
            raise DataError(f"{where}: not usable JSON: it is nested too deep") from None
        objects.append(_check_object(value, where))
        lines.append(number)
    has_blanks = bool(lines) and lines[-1] > len(lines)
    return JsonRows(objects, "JSON Lines", lines if has_blanks else None)


def _single_object(path: Path, text: str) -> JsonObject | None:
    """Return the object if the entire text is a single one; otherwise None."""
    if not text.rstrip().endswith("}"):
        return None
    try:
        value = _parse(text)
    # Several objects, or a syntax error that is later reported with its line.
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, JsonObject) else None


def _is_by_client(value: JsonObject, row_columns: Collection[str]) -> bool:
    """Return whether an object holds a list of rows for each of several clients."""
    if len(value) < 2 or not value.keys().isdisjoint(row_columns):
        return False
    for rows in value.values():
        if not isinstance(rows, list) or not all(isinstance(row, JsonObject) for row in rows):
            return False
    return True


def _client_rows(path: Path, value: JsonObject) -> JsonRows:
    """Return the rows of all clients, concatenated."""
    if value.repeated:
        client = printable(repr(min(value.repeated)), 60)
        raise DataError(f"{path}: the client {client} comes twice; put its rows into one list")
    splits = [name for name in value if name.lower() in SPLIT_NAMES]
    if splits:
        raise DataError(
            f"{path}: holds lists of rows by client, and {', '.join(map(repr, splits))} names a "
            "part of a data set, not a client. Save each part as a file of its own (the one that "
            "is held out is data.test-source), or rename the client"
        )
    # Collect all rows in one list, and the client of each in another.
    objects: list[JsonObject] = []
    owners: list[str] = []
    for client, rows in value.items():
        check_client_name(client, f"{path}, a key of the outer object", DataError)
        if not rows:
            raise DataError(f"{path}: client {client!r} has no rows; give it some or leave it out")
        objects += rows
        owners += [client] * len(rows)
    return JsonRows(objects, "JSON, lists by client", owners=owners)


def _check_object(value: Any, where: str) -> JsonObject:
    """Return a row after checking that it is an object."""
    if not isinstance(value, JsonObject):
        raise DataError(
            f"{where}: must be an object with named columns; got {type(value).__name__}"
        )
    return value


def _parse(text: str) -> Any:
    """Parse JSON, with objects as `JsonObject`."""
    return json.loads(text, object_pairs_hook=_json_object, parse_int=_parse_integer)


def _json_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Build an object from its keys and values."""
    result = JsonObject(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        result.repeated = frozenset(name for name in result if names.count(name) > 1)
    return result


def _parse_integer(text: str) -> int | float:
    """Parse an integer, as a float if it has thousands of digits.

    No used column holds such a number.
    """
    return int(text) if len(text) <= MAX_INTEGER_DIGITS else float(text)


def _hint(error: json.JSONDecodeError) -> str:
    """Return an explanation of the most common mistakes, which the parser does not give."""
    before = error.doc[: error.pos].rstrip()
    after = error.doc[error.pos :].lstrip()
    if before.endswith(",") and after[:1] in ("]", "}"):
        return " (a comma stands before the closing bracket)"
    if after[:1] == "'":
        return " (names and texts stand in double quotes)"
    return ""
