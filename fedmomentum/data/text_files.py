"""Rows of JSON and CSV files. Columns that are not used are parsed and not looked at."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

MAX_INTEGER_DIGITS = 4000
"""Digits of a whole number; Python refuses to parse more than 4,300."""


class JsonObject(dict[str, Any]):
    """A JSON object that remembers its repeated keys, whose first values are lost."""

    repeated: frozenset[str] = frozenset()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without its byte order mark, its line ends as they are.

    Raises:
        DataError: If the file is in another encoding, damaged or empty, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path}: not UTF-8 text but UTF-16 (or UTF-32), by its first bytes; save it as UTF-8"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line}: holds a NUL character; the file is damaged, or in UTF-16: "
            "restore it, or save it as UTF-8"
        )
    if not text.strip():
        raise DataError(f"{path}: empty file; an empty data set cannot be used")
    return text


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────


def json_rows(path: Path, text: str) -> list[JsonObject]:
    """Return the objects of a JSON file: a list of them, or one a line.

    Raises:
        DataError: If the text is something else; the message names the line or the row.
    """
    return _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)


def json_column(path: Path, rows: Sequence[JsonObject], name: str) -> Iterator[Any]:
    """Yield the values of one column; None where a row does not have it.

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
    """Return the names of all rows' columns, in the order in which they first occur."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return list(names)


def _repeated_key(value: Any) -> str | None:
    """Return a key that an object somewhere in the value has more than once."""
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
    """Return the objects of a JSON list."""
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


def _json_lines(path: Path, text: str) -> list[JsonObject]:
    """Return the objects of a file with one a line."""
    objects = []
    # Only \n ends a line: JSON strings may hold other characters that str.splitlines takes for
    # line ends.
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        where = f"{path}, line {number}"
        try:
            value = _parse(line)
        except json.JSONDecodeError as error:
            alternative = "" if path.suffix == ".jsonl" else ", or a list of objects"
            raise DataError(
                f"{where}: not valid JSON: {error.msg}{_hint(error)}; wanted one object a "
                f"line{alternative}"
            ) from None
        except RecursionError:
            raise DataError(f"{where}: not usable JSON: it is nested too deep") from None
        objects.append(_check_object(value, where))
    return objects


def _check_object(value: Any, where: str) -> JsonObject:
    """Return a row of a JSON file, which must be an object."""
    if not isinstance(value, JsonObject):
        raise DataError(
            f"{where}: must be an object with named columns; got {type(value).__name__}"
        )
    return value


def _parse(text: str) -> Any:
    """Parse JSON, its objects as `JsonObject`."""
    return json.loads(text, object_pairs_hook=_json_object, parse_int=_parse_integer)


def _json_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Return an object of its keys and values."""
    result = JsonObject(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        result.repeated = frozenset(name for name in result if names.count(name) > 1)
    return result


def _parse_integer(text: str) -> int | float:
    """Return a whole number; as a float where it has thousands of digits.

    No column that is used holds such a number.
    """
    return int(text) if len(text) <= MAX_INTEGER_DIGITS else float(text)


def _hint(error: json.JSONDecodeError) -> str:
    """Return the reason for the most common mistakes, which the parser does not name."""
    before = error.doc[: error.pos].rstrip()
    after = error.doc[error.pos :].lstrip()
    if before.endswith(",") and after[:1] in ("]", "}"):
        return " (a comma stands before the closing bracket)"
    if after[:1] == "'":
        return " (names and texts stand in double quotes)"
    return ""


# ── CSV ───────────────────────────────────────────────────────────────────────────────────────────


def csv_columns(path: Path, text: str) -> dict[str, list[str]]:
    """Return the columns of a CSV file with a header; all values are text.

    Raises:
        DataError: If the text is not CSV, or a line has too few or too many values; the message
            names the line.
    """
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    records = []
    with _unlimited_field_size():
        try:
            header = next(reader)
            _check_header(path, header)
            for record in reader:
                if len(record) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(record)} values for {len(header)} "
                        "columns; put values that hold a comma or a line end in double quotes"
                    )
                records.append(record)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
    columns = {}
    for position, name in enumerate(header):
        columns[name] = [record[position] for record in records]
    return columns


def _check_header(path: Path, header: list[str]) -> None:
    """Refuse a header with a column that has no name, or another's."""
    if len(set(header)) != len(header) or not all(header):
        raise DataError(
            f"{path}: the header must name each column once; got {printable(repr(header))} (a "
            "comma at the end of a line makes a column without a name)"
        )


@contextmanager
def _unlimited_field_size() -> Iterator[None]:
    """Accept long texts, which the CSV reader otherwise takes for a quote that was never closed."""
    previous = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(previous)
