"""Rows of JSON and CSV files. What no column in use holds does not matter: it is parsed, and not looked at."""

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
from fedmomentum.schema import printable

_LONGEST_INTEGER = 4000
"""Digits of a whole number; Python refuses to read more than 4,300."""


class JsonObject(dict[str, Any]):
    """A JSON object that remembers which of its keys came more than once: the first values are lost."""

    repeated: frozenset[str] = frozenset()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, its byte order mark left out and its line ends as they are.

    Raises:
        DataError: If it is in another encoding, damaged or empty, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: not UTF-8 text but UTF-16 (or UTF-32), by its first bytes; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line}: holds a NUL character; the file is damaged, or in UTF-16: restore it, or save it as "
            "UTF-8"
        )
    if not text.strip():
        raise DataError(f"{path}: empty file; an empty data set cannot be used")
    return text


# ── JSON ──


def json_rows(path: Path, text: str) -> list[JsonObject]:
    """Return the objects of a JSON file: a list of them, or one a line.

    Raises:
        DataError: If the text is something else; names the line or the row.
    """
    return _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)


def json_column(path: Path, rows: Sequence[JsonObject], name: str) -> Iterator[Any]:
    """Yield one column's values; None where a row lacks it.

    Raises:
        DataError: If a row has the column twice, or its value has a key twice; names the row.
    """
    for number, row in enumerate(rows, start=1):
        repeated = name if name in row.repeated else _repeated_key(row.get(name))
        if repeated is not None:
            raise DataError(
                f"{path}, row {number}: column {name!r}: the key {printable(repr(repeated), 60)} comes twice in one "
                "object, and only the last value would count; keep one"
            )
        yield row.get(name)


def _repeated_key(value: Any) -> str | None:
    """Return a key that an object somewhere in the value has more than once."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, JsonObject):
            if one.repeated:
                return min(one.repeated)
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return None


def _json_list(path: Path, text: str) -> list[JsonObject]:
    try:
        values = _parsed(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}{_hint(error)}") from None
    except RecursionError:
        raise DataError(f"{path}: not usable JSON: lists or objects are nested too deep") from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, JsonObject):
            raise DataError(f"{path}, row {number}: must be an object with named columns; got {type(value).__name__}")
    return list(values)


def _json_lines(path: Path, text: str) -> list[JsonObject]:
    objects = []
    # Only \n ends a line: JSON strings may hold other characters that str.splitlines takes for line ends.
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        try:
            value = _parsed(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not valid JSON: {error.msg}{_hint(error)}; wanted one object a line"
                + ("" if path.suffix == ".jsonl" else ", or a list of objects")
            ) from None
        except RecursionError:
            raise DataError(f"{path}, line {number}: not usable JSON: it is nested too deep") from None
        if not isinstance(value, JsonObject):
            raise DataError(f"{path}, line {number}: must be an object with named columns; got {type(value).__name__}")
        objects.append(value)
    return objects


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_json_object, parse_int=_integer)


def _json_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    made = JsonObject(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        made.repeated = frozenset(name for name in made if names.count(name) > 1)
    return made


def _integer(text: str) -> int | float:
    """Return a whole number; one of thousands of digits, which is in no column that is used, as a float."""
    return int(text) if len(text) <= _LONGEST_INTEGER else float(text)


def _hint(error: json.JSONDecodeError) -> str:
    """Return the reason for the commonest mistakes, which the parser does not name."""
    before = error.doc[: error.pos].rstrip()
    after = error.doc[error.pos :].lstrip()
    if before.endswith(",") and after[:1] in ("]", "}"):
        return " (a comma stands before the closing bracket)"
    if after[:1] == "'":
        return " (names and texts stand in double quotes)"
    return ""


# ── CSV ──


def csv_columns(path: Path, text: str) -> dict[str, list[str]]:
    """Return the columns of a CSV file with a header; all values are text.

    Raises:
        DataError: If the text is no CSV, or a line has too few or too many values; names the line.
    """
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    with _fields_of_any_length():
        try:
            header = next(reader)
            if len(set(header)) != len(header) or not all(header):
                raise DataError(
                    f"{path}: the header must name each column once; got {printable(repr(header))} (a comma at the end "
                    "of a line makes a column without a name)"
                )
            records = []
            for record in reader:
                if len(record) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(record)} values for {len(header)} columns; "
                        "put values that hold a comma or a line end in double quotes"
                    )
                records.append(record)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
    return {name: [record[position] for record in records] for position, name in enumerate(header)}


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Allow long texts, which the CSV reader otherwise takes for a quote that was never closed."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all rows' columns, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row))
