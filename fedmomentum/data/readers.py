"""Converts a data set's rows into examples.

Errors name the file, the row (from 1, a CSV header not counted) and the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmomentum.data.columns import find_format, join_names
from fedmomentum.data.examples import MAX_CATEGORIES, MAX_LABEL, Example, label_problem
from fedmomentum.data.row_formats import Cells, parse_row
from fedmomentum.data.rows import Rows
from fedmomentum.data.rows import read_rows as read_rows
from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from datasets import Dataset


def to_examples(
    rows: Rows | Dataset,
    *,
    category_column: str | None = None,
    where: str = "",
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Convert rows into examples; the columns decide the format, and no other column is read.

    - ``messages`` or ``conversations``: a chat whose last message is the assistant's: that is the
      completion, all messages before it are the prompt. Messages have `role` and `content`, or
      ShareGPT's `from` and `value`; see `chats`.
    - ``prompt`` and ``completion``: each text or a list of messages, the completion then holding
      one message, the assistant's.
    - ``prompt``, ``chosen`` and ``rejected``: the same with two answers, of which the first is
      preferred. Where these two are whole chats that differ in their last message, the messages
      before it are the prompt, and the column ``prompt`` may be missing.
    - ``instruction``, ``output`` and perhaps ``input``: one message of the user, the instruction,
      then a blank line and the input where it is not empty. An ``answer`` column counts only where
      there is no ``output``. ``instruction``, ``response`` and perhaps ``context`` likewise.
    - ``question`` and ``answer``: one message of the user, and the assistant's answer.
    - ``text``, where no other format fits: no prompt, and all of the text is learned.

    A column ``system`` beside messages, an instruction or a question is the system's message.

    Args:
        rows: The rows, from `read_rows`.
        category_column: The column whose value becomes the example's category; None leaves it
            empty.
        where: Name of the file, for messages.
        columns: Our names of columns to the file's own, as `data.columns` has them.

    Returns:
        One example a row, in the order of the rows.

    Raises:
        DataError: If the columns fit no format or several, or a row has another shape (named).
    """
    # Which columns count.
    rows = Rows.of(rows)
    form = find_format(rows.column_names, columns or {}, where)
    _refuse_tools(rows, where)
    categories = [""] * rows.num_rows
    if category_column:
        categories = column_texts(rows, category_column, where=where)
    num_categories = len(set(categories))
    if num_categories > MAX_CATEGORIES:
        raise DataError(
            f"{_prefix(where)}column {category_column!r} has {num_categories} different values, "
            f"more than {MAX_CATEGORIES}; a category is what many rows have in common"
        )
    # Row by row, so that a message can name the row.
    values_by_column = [_column(rows, name, where) for name in form.names.values()]
    examples = []
    for number, (category, *values) in enumerate(
        zip(categories, *values_by_column, strict=True), start=1
    ):
        cells = Cells(dict(zip(form.names, values, strict=True)), form.names)
        try:
            answer = parse_row(form.kind, cells)
            example = Example(
                answer.prompt,
                answer.completion,
                category,
                rejected=answer.rejected,
                source_row=number,
                learned_turns=answer.learned_turns,
            )
            examples.append(example)
        except DataError as error:
            raise DataError(f"{_prefix(where)}{rows.place(number)}: {error}") from None
    return examples


def column_texts(rows: Rows | Dataset, column: str, *, where: str = "") -> list[str]:
    """Return one column's labels as text: names of a ClassLabel, numbers written out.

    Args:
        rows: The rows, from `read_rows`.
        column: The name of the column.
        where: Name of the file, for messages.

    Returns:
        One text a row, none empty, none longer than `MAX_LABEL` or with control characters: they
        are shown to people, and travel to the server.

    Raises:
        DataError: If there is no such column, or a row's value is missing or neither text nor a
            whole number, or of another kind than those before it.
    """
    rows = Rows.of(rows)
    if column not in rows.column_names:
        known = join_names(rows.column_names)
        raise DataError(f"{_prefix(where)}no column {column!r}; found: {known}")
    label_names = rows.label_names.get(column)
    texts = []
    kinds: set[type] = set()
    for number, value in enumerate(_column(rows, column, where), start=1):
        place = f"{_prefix(where)}{rows.place(number)}: column {column!r}"
        label = _label(value, label_names, place)
        # Text and numbers in one column would become one label.
        kinds.add(type(label))
        if len(kinds) > 1:
            raise DataError(
                f"{place} is {_shown(label)}, and rows before it hold another kind of value; a "
                "column must hold one kind of value in all rows, for 1 and '1' would be taken for "
                "the same"
            )
        problem = label_problem(str(label))
        if problem is not None:
            raise DataError(
                f"{place} {problem}; it must be a short name of at most {MAX_LABEL} characters"
            )
        texts.append(str(label))
    return texts


def _label(value: Any, label_names: Sequence[str] | None, place: str) -> str | int:
    """Return a value of a column of labels, its number replaced by the label's name."""
    if label_names is not None and type(value) is int:
        if not 0 <= value < len(label_names):
            raise DataError(
                f"{place} is {value}, which is none of its {len(label_names)} labels (-1: no label)"
            )
        value = label_names[value]
    if not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{place} is {_shown(value)}; it must be text or a number")
    return value


def _column(rows: Rows, name: str, where: str) -> list[Any]:
    """Return a column's values.

    Raises:
        DataError: If a text in them was cut within a character.
    """
    values = rows[name]
    for number, value in enumerate(values, start=1):
        surrogate = _lone_surrogate(value)
        if surrogate is not None:
            raise DataError(
                f"{_prefix(where)}{rows.place(number)}: column {name!r} holds {surrogate!r}, half "
                "of a character that takes two (a lone surrogate): the text was cut within a "
                "character. Write the row again, or drop it"
            )
    return values


def _lone_surrogate(value: Any) -> str | None:
    """Return half a character from a text, or from any text in a list or an object."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                return item[error.start]
        elif isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
    return None


def _refuse_tools(rows: Rows, where: str) -> None:
    """Refuse a column of tool definitions, which chat templates would write into the chat."""
    if "tools" not in rows.column_names:
        return
    for number, value in enumerate(_column(rows, "tools", where), start=1):
        if value:
            raise DataError(
                f"{_prefix(where)}{rows.place(number)}: column 'tools' holds {_shown(value)}; "
                "definitions of tools are not supported, and left out they would be missing from "
                "the prompt. Write them into the system message, or remove the column"
            )


# ── messages to the user ──────────────────────────────────────────────────────────────────────────


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def _shown(value: Any) -> str:
    """Return a value of the data for a message: one line, and cut where it is long."""
    return printable(repr(value), 100)
