"""Excel workbooks: text and plain numbers are read, what depends on Excel's display is refused."""

import datetime

import openpyxl
import pytest

from fedmomentum.data import read_rows, to_examples
from fedmomentum.errors import DataError


def write(path, *rows, sheets=()):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for name in sheets:
        book.create_sheet(name).append(["question", "answer"])
    book.save(path)
    return path


def read(path):
    return to_examples(read_rows(path), where=path.name)


def test_cells_are_text_and_empty_rows_and_columns_are_ignored(tmp_path):
    file = write(
        tmp_path / "D.XLSX",
        [],
        [None, "question", "answer", None, "note"],
        [0, "How many?", 42, None, datetime.date(2026, 1, 2)],
        [],
        [1, "How much?", 0.5, None, None],
        [2, "x" * 32_000, "y\nz", None, None],
    )
    found = read_rows(file)
    assert found.column_names == ["question", "answer", "note"]
    assert found["answer"] == ["42", "0.5", "y\nz"]
    assert len(read(file)) == 3


def test_what_excel_shows_otherwise_is_refused_by_row_and_column(tmp_path):
    file = write(tmp_path / "d.xlsx", ["question", "answer"], ["a", "b"], [], ["When?", None])
    with pytest.raises(DataError, match=r"row 2 \(line 4\): column 'answer' is None"):
        read(file)
    file = write(tmp_path / "d.xlsx", ["question", "answer"], ["When?", datetime.date(2026, 1, 2)])
    with pytest.raises(DataError, match="row 1 .*column 'answer' is .*format the cell as text"):
        read(file)
    book = openpyxl.load_workbook(file)
    book.active["B2"] = "=1/0"
    book.save(file)
    with pytest.raises(DataError, match="column 'answer' is None"):
        read(file)
    book.active["B2"].value = 0.25
    book.active["B2"].number_format = "0%"
    book.save(file)
    with pytest.raises(DataError, match=r"column 'answer' is 0.25, shown by Excel as 0%"):
        read(file)


def test_ambiguous_workbooks_are_refused(tmp_path):
    file = write(tmp_path / "d.xlsx", ["question", "answer"], ["a", "b"], sheets=("Two",))
    with pytest.raises(DataError, match="several sheets, 'Sheet', 'Two'; keep the one"):
        read(file)
    file = write(tmp_path / "d.xlsx", ["question", "answer"], ["a", "b", "c"])
    with pytest.raises(DataError, match="the header must name each column once"):
        read(file)
    with pytest.raises(DataError, match="empty workbook"):
        read(write(tmp_path / "d.xlsx"))
    (tmp_path / "d.xlsx").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match="not a readable .xlsx workbook"):
        read(tmp_path / "d.xlsx")
    (tmp_path / "d.xls").write_bytes(b"x")
    with pytest.raises(DataError, match="Save the workbook as .xlsx"):
        read(tmp_path / "d.xls")
