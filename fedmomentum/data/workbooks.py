"""Excel workbooks: the text of their cells, as far as the file reveals it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from fedmomentum.data.tables import Table, check_header
from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

GENERAL_FORMAT = "General"
"""Excel's default number format, which shows a number as it is."""
NUM_DIGITS = 15
"""The significant digits of Excel's numbers: it stores 0.30000000000000004 and shows 0.3."""


class NoText:
    """A cell whose text depends on how Excel displays it, for error messages."""

    def __init__(self, description: str) -> None:
        self._description = description

    def __repr__(self) -> str:
        return self._description


def read_workbook(path: Path) -> Table:
    """Return the columns of the only non-empty sheet of an Excel workbook.

    Values are those that Excel last computed. Numbers in the default number format become text, as
    in a CSV file. Other numbers do not, since the value does not reveal how Excel displays it.

    Raises:
        DataError: If the file is not a workbook, has several non-empty sheets, or its header has
            unnamed or duplicate columns.
    """
    try:
        workbook = _open_workbook(path)
    # A damaged workbook can cause any kind of error.
    except Exception as error:
        is_archive = zipfile.is_zipfile(path)
        reason = str(error) if is_archive else "it is no archive (perhaps it has a password)"
        raise DataError(
            f"{path}: not a readable .xlsx workbook: {printable(reason, 200)}; save it again as "
            ".xlsx, or as CSV in UTF-8"
        ) from None
    try:
        sheets = {sheet.title: _sheet_rows(sheet) for sheet in workbook.worksheets}
    except Exception as error:
        raise DataError(
            f"{path}: not a readable .xlsx workbook: {printable(str(error), 200)}"
        ) from None
    finally:
        workbook.close()
    filled = {title: rows for title, rows in sheets.items() if rows}
    if not filled:
        raise DataError(f"{path}: empty workbook; an empty data set cannot be used")
    if len(filled) > 1:
        names = printable(", ".join(map(repr, filled)))
        raise DataError(
            f"{path}: has several sheets, {names}; keep the one with the examples, or save each as "
            "a workbook of its own"
        )
    ((title, rows),) = filled.items()
    return _sheet_table(path, title, rows)


def _open_workbook(path: Path) -> Any:
    """Open a workbook like `openpyxl.load_workbook`, with all texts as they are stored.

    openpyxl removes the escapes from some texts and not from others, and then they look the same.
    """
    from openpyxl.cell.text import Text
    from openpyxl.reader.excel import ExcelReader
    from openpyxl.xml.constants import SHARED_STRINGS, SHEET_MAIN_NS
    from openpyxl.xml.functions import iterparse

    class Reader(ExcelReader):  # type: ignore[misc]
        def read_strings(self) -> None:
            part = self.package.find(SHARED_STRINGS)
            if part is None:
                return
            texts = []
            with self.archive.open(part.PartName[1:]) as source:
                for _, node in iterparse(source):
                    if node.tag == f"{{{SHEET_MAIN_NS}}}si":
                        texts.append(Text.from_tree(node).content)
                        node.clear()
            self.shared_strings = texts

    reader = Reader(path, read_only=True, data_only=True)
    reader.read()
    return reader.wb


_SheetRows = list[tuple[int, list[Any]]]


def _sheet_rows(sheet: Any) -> _SheetRows:
    """Return the non-empty rows of a sheet, with row numbers."""
    # The size stated in the file may be wrong, and rows would then be missing.
    sheet.reset_dimensions()
    found = []
    for number, cells in enumerate(sheet.iter_rows(), start=1):
        values = [_cell_value(cell) for cell in cells]
        while values and values[-1] is None:
            values.pop()
        if values:
            found.append((number, values))
    return found


def _cell_value(cell: Any) -> Any:
    """Return a cell's text; None if it is empty, `NoText` if the value does not reveal the text."""
    from openpyxl.utils.escape import unescape

    value = cell.value
    if value is None or (isinstance(value, str) and not value):
        return None
    if cell.data_type == "e":
        return NoText(f"{value}, an error of a formula")
    if isinstance(value, str):
        # Excel writes carriage returns and other control characters as _x000D_.
        return unescape(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and cell.number_format == GENERAL_FORMAT:
        return f"{value:.{NUM_DIGITS}g}" if isinstance(value, float) else str(value)
    shape = str(cell.number_format)[:30]
    return NoText(f"{str(value)[:30]}, shown by Excel as {shape}: format the cell as text")


def _sheet_table(path: Path, title: str, rows: _SheetRows) -> Table:
    """Return the columns of a sheet whose first row is the header."""
    # Rows end at their last value; pad them to the longest.
    width = max(len(values) for _, values in rows)
    padded = [values + [None] * (width - len(values)) for _, values in rows]
    header = ["" if value is None else str(value).strip() for value in padded[0]]
    by_position = []
    for position in range(width):
        by_position.append([values[position] for values in padded[1:]])
    # Formerly formatted cells beside the table are not a column.
    kept = []
    for position, name in enumerate(header):
        if name or any(value is not None for value in by_position[position]):
            kept.append(position)
    has_index = check_header(path, [header[position] for position in kept])
    columns = {header[position]: by_position[position] for position in kept[has_index:]}
    lines = [number for number, _ in rows[1:]]
    return Table(columns, lines, has_index, f"sheet {title!r}")
