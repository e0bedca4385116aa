"""A table with a header, from a CSV file or workbook."""

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
        columns: Name of each column -> its values, one per row.
        lines: The line of the file, or the row of the sheet, on which each row begins; None if
            that is the row number plus one for the header.
        has_index: Whether an unnamed first column was left out.
        detail: The delimiter or the sheet, for display.
    """

    columns: dict[str, list[Any]]
    lines: list[int] | None
    has_index: bool
    detail: str


def check_header(path: Path, header: Sequence[str]) -> bool:
    """Reject a header with unnamed or duplicate columns.

    Returns:
        Whether the first column has no name, meaning that it holds row numbers.

    Raises:
        DataError: If another column has no name, or two columns have the same name.
    """
    has_index = len(header) > 1 and not header[0].strip()
    names = header[1:] if has_index else header
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise DataError(
            f"{path}: the header must name each column once; got {printable(repr(list(header)))} "
            "(a comma at the end of a line makes a column without a name)"
        )
    return has_index
