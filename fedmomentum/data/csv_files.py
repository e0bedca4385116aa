"""CSV files: delimiter, header and rows."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmomentum.data.tables import Table, check_header
from fedmomentum.errors import DataError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
"""Supported delimiters, with names for messages."""

# Excel's own first line, which names the delimiter.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[ \t]*(?:\r\n|\n|\r)', re.IGNORECASE)


@dataclass(frozen=True)
class _Records:
    """The non-blank lines of a CSV file, with line numbers."""

    header: list[str]
    values: list[list[str]]
    lines: list[int]
    has_blanks: bool


def read_csv(path: Path, text: str, delimiter: str | None = None) -> Table:
    """Parse the columns of a CSV file with a header; all values are text.

    The delimiter is given by a first line such as `sep=;`; otherwise it is the one of `DELIMITERS`
    with which every line has as many values as the header. Blank lines are skipped. An unnamed
    first column holds the row numbers that pandas and R write, and is left out.

    Args:
        path: The file, for error messages.
        text: Its content.
        delimiter: The delimiter, if the file's extension implies it.

    Raises:
        DataError: If the text is not CSV, a line has too few or too many values, or several
            delimiters fit; the message names the line.
    """
    # The delimiter comes from a `sep=` line, the file's extension, or what fits.
    offset = 0
    named = _SEPARATOR_LINE.match(text)
    if named is not None:
        delimiter = named[1]
        text = text[named.end() :]
        offset = 1
    if delimiter is None:
        delimiter = _find_delimiter(path, text)
    # Collect the values by column, without row numbers.
    records = _parse(path, text, delimiter, offset)
    has_index = check_header(path, records.header)
    columns = {}
    for position, name in enumerate(records.header):
        if not (has_index and position == 0):
            columns[name] = [values[position] for values in records.values]
    lines = records.lines if records.has_blanks or offset else None
    detail = f"values separated by a {DELIMITERS.get(delimiter, repr(delimiter))}"
    return Table(columns, lines, has_index, detail)


def _find_delimiter(path: Path, text: str) -> str:
    """Return the delimiter of a CSV file; a comma if its header has only one column."""
    candidates = [delimiter for delimiter in DELIMITERS if _header_width(text, delimiter) > 1]
    if len(candidates) < 2:
        return candidates[0] if candidates else ","
    # The header is ambiguous; try the other lines.
    fitting = []
    for delimiter in candidates:
        try:
            check_header(path, _parse(path, text, delimiter, 0).header)
            fitting.append(delimiter)
        except DataError:
            continue
    if len(fitting) > 1:
        names = " or a ".join(DELIMITERS[delimiter] for delimiter in fitting)
        raise DataError(
            f"{path}: its values may be separated by a {names}, for every line has as many of each "
            f"as the header; name the right one in a first line, such as sep={fitting[0]}"
        )
    # If none fits, the error message will be about the most likely one.
    return max(fitting or candidates, key=lambda delimiter: _header_width(text, delimiter))


def _header_width(text: str, delimiter: str) -> int:
    """Return the number of columns in the first non-blank line; 0 if it is not CSV."""
    with _unlimited_field_size():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            return next((len(record) for record in reader if any(record)), 0)
        except csv.Error:
            return 0


def _parse(path: Path, text: str, delimiter: str, offset: int) -> _Records:
    """Return the header and the other lines, which must have the same number of values.

    Args:
        path: The file, for error messages.
        text: Its content.
        delimiter: The delimiter.
        offset: Number of lines that precede the text.

    Raises:
        DataError: If a line has a different number of values, or the text is not CSV.
    """
    stripped = text.rstrip("\r\n")
    header: list[str] = []
    values: list[list[str]] = []
    lines: list[int] = []
    has_blanks = False
    with _unlimited_field_size():
        reader = csv.reader(io.StringIO(stripped, newline=""), delimiter=delimiter, strict=True)
        previous = 0
        try:
            for record in reader:
                line = previous + 1 + offset
                previous = reader.line_num
                # Blank, or a row of empty cells, as spreadsheets write them.
                if not any(value.strip() for value in record):
                    has_blanks = True
                elif not header:
                    header = record
                elif len(record) != len(header):
                    raise DataError(_wrong_width(path, reader.line_num + offset, record, header))
                else:
                    values.append(record)
                    lines.append(line)
        except csv.Error as error:
            line = reader.line_num + offset
            raise DataError(f"{path}, line {line}: not valid CSV: {error}") from None
    return _Records(header, values, lines, has_blanks)


def _wrong_width(path: Path, line: int, record: Sequence[str], header: Sequence[str]) -> str:
    """Return the error message for a line with too few or too many values."""
    return (
        f"{path}, line {line}: {len(record)} values for {len(header)} columns; put values that "
        "hold a delimiter (such as a comma) or a line end in double quotes"
    )


@contextmanager
def _unlimited_field_size() -> Iterator[None]:
    """Accept long texts, which the CSV reader otherwise mistakes for an unclosed quote."""
    previous = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(previous)
