"""Excel workbooks: text and plain numbers are read, what depends on Excel's display is refused."""

import datetime
import zipfile

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


def rewritten(path, change):
    """Change the members of a workbook's archive, to store what openpyxl does not write."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


SHEET = "xl/worksheets/sheet1.xml"
TYPES = "[Content_Types].xml"
SHARED_TEXTS = (
    '<Override PartName="/xl/sharedStrings.xml" ContentType="application/'
    'vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"/></Types>'
)
NAMESPACE = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


def share(members, text):
    """Move a cell's text to the table of texts that cells share, where Excel stores all."""
    cell = f't="inlineStr"><is><t>{text}</t></is>'.encode()
    assert cell in members[SHEET]
    members[SHEET] = members[SHEET].replace(cell, b't="s"><v>0</v>')
    members[TYPES] = members[TYPES].replace(b"</Types>", SHARED_TEXTS.encode())
    table = f'<sst xmlns="{NAMESPACE}"><si><t>{text}</t></si></sst>'
    members["xl/sharedStrings.xml"] = table.encode()


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("a_x000D_", "a\r"),
        ("_x0009_a", "\ta"),
        # an underscore that Excel escaped, because what follows looks like an escape
        ("a_x005F_x000D_", "a_x000D_"),
        ("a_x00_b", "a_x00_b"),
    ],
)
def test_characters_that_excel_escapes_are_read_as_they_are(text, read_as, tmp_path):
    file = write(tmp_path / "d.xlsx", ["question", "answer"], [text, "b"])
    assert read_rows(file)["question"] == [read_as]
    assert read_rows(rewritten(file, lambda members: share(members, text)))["question"] == [read_as]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(b"0.30000000000000004", "0.3"), (b"5.0", "5"), (b"1E+21", "1e+21"), (b"-0.1", "-0.1")],
)
def test_numbers_have_the_digits_that_excel_shows(value, shown, tmp_path):
    file = write(tmp_path / "d.xlsx", ["question", "answer"], ["0.1 * 3?", 0.375])

    def store(members):
        members[SHEET] = members[SHEET].replace(b"<v>0.375</v>", b"<v>%s</v>" % value)

    assert read_rows(rewritten(file, store))["answer"] == [shown]


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
