"""A table with a header, as CSV files and workbooks hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable


@dataclass(frozen=True)
class Table:
    """The columns of a table.

    Attributes:
        columns: Name of each column to its values, one a row.
        lines: The line of the file, or the row of the sheet, in which each row begins; None where
            that is the row's number and one for the header.
        has_index: Whether a first column without a name was left out.
        detail: The delimiter or the sheet, for people.
    """

    columns: dict[str, list[Any]]
    lines: list[int] | None
    has_index: bool
    detail: str


def check_header(path: Path, header: Sequence[str]) -> bool:
    """Refuse a header with a column that has no name, or another's.

    Returns:
        Whether the first column has no name, which is a column of row numbers.

    Raises:
        DataError: If another column has no name, or two have the same.
    """
    has_index = len(header) > 1 and not header[0].strip()
    names = header[1:] if has_index else header
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise DataError(
            f"{path}: the header must name each column once; got {printable(repr(list(header)))} "
            "(a comma at the end of a line makes a column without a name)"
        )
    return has_index
