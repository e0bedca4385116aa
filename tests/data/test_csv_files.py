"""CSV as programs write it: one delimiter fits, or the refusal says how to name it."""

import pytest

from fedmomentum.data import read_rows
from fedmomentum.errors import DataError
from tests.data.dicts import as_dicts

WANTED = [{"question": "a, b?", "answer": "c; d"}, {"question": "e", "answer": "f"}]


@pytest.mark.parametrize(
    "text",
    [
        'question,answer\n"a, b?",c; d\ne,f\n',
        'question;answer\r\na, b?;"c; d"\r\n\r\ne;f\r\n;\r\n',
        "question\tanswer\na, b?\tc; d\ne\tf\n",
        "question|answer\na, b?|c; d\ne|f",
        "sep=|\nquestion|answer\na, b?|c; d\ne|f\n",
        '"sep=\t"\r\nquestion\tanswer\r\na, b?\tc; d\r\ne\tf\r\n',
        ',question,answer\n0,"a, b?",c; d\n1,e,f\n',
        '"";question;answer\n"1";"a, b?";"c; d"\n"2";e;f\n',
        '\n\nquestion,answer\n"a, b?",c; d\n,\n  \ne,f\n',
    ],
)
def test_delimiters_blank_lines_and_row_numbers_are_recognized(text, tmp_path):
    (tmp_path / "D.CSV").write_bytes(text.encode())
    assert as_dicts(read_rows(tmp_path / "D.CSV")) == WANTED


def test_the_other_lines_decide_where_the_header_does_not(tmp_path):
    (tmp_path / "d.csv").write_text("question;answer, short\na;b\nc;d\n")
    assert read_rows(tmp_path / "d.csv").column_names == ["question", "answer, short"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "question;answer, short\na;b, c\n",
            "separated by a comma or a semicolon, .*in a first line, such as sep=,",
        ),
        ("sep=;\nquestion;answer\na;b\nc\n", "d.csv, line 4: 1 values for 2 columns"),
        ("question;answer\n\na;b\n\nc;d;e\n", "d.csv, line 5: 3 values for 2 columns"),
        ("question,,answer\na,b,c\n", "the header must name each column once"),
    ],
)
def test_what_is_not_clear_is_refused_by_line(text, message, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "d.csv")
