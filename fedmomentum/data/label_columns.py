"""Columns of labels: clients, categories, privacy units, and a classifier's labels."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedmomentum.data.examples import MAX_LABEL, Example, label_problem
from fedmomentum.data.rows import Rows
from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable, short_repr

if TYPE_CHECKING:
    from datasets import Dataset


_log = logging.getLogger(__name__)


def column_texts(rows: Rows | Dataset, column: str, *, where: str = "") -> list[str]:
    """Return one column's labels as text: the names of a ClassLabel, numbers as text.

    Spaces around a label do not belong to it.

    Args:
        rows: The rows, from `read_rows`.
        column: The name of the column.
        where: Name of the file, for error messages.

    Returns:
        One text per row, never empty, longer than `MAX_LABEL` or with control characters, since
        labels are displayed and sent to the server.

    Raises:
        DataError: If there is no such column, or a row's value is missing, neither text nor an
            integer, or of a different type than those before it.
    """
    rows = Rows.of(rows)
    if column not in rows.column_names:
        known = printable(", ".join(rows.column_names))
        raise DataError(f"{file_prefix(where)}no column {column!r}; found: {known}")
    label_names = rows.label_names.get(column)
    texts = []
    kinds: set[type] = set()
    for number, value in enumerate(read_column(rows, column, where), start=1):
        place = f"{file_prefix(where)}{rows.place(number)}: column {column!r}"
        label = _label(value, label_names, place)
        # Text and numbers in one column would collapse into one label.
        kinds.add(type(label))
        if len(kinds) > 1:
            raise DataError(
                f"{place} is {short_repr(label)}, and rows before it hold another kind of value; a "
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
    """Return the value of a label column, with a number replaced by the label's name."""
    if label_names is not None and type(value) is int:
        if not 0 <= value < len(label_names):
            raise DataError(
                f"{place} is {value}, which is none of its {len(label_names)} labels (-1: no label)"
            )
        value = label_names[value]
    if not isinstance(value, str | int) or not str(value).strip():
        hint = ""
        if isinstance(value, float):
            hint = (
                ". Missing values turn a column of integers into 1.0: fill them in or drop those "
                "rows, and write the column as integers or text"
            )
        raise DataError(f"{place} is {short_repr(value)}; it must be text or an integer{hint}")
    return value.strip() if isinstance(value, str) else value


def warn_of_lookalikes(labels: Iterable[str], column: str, where: str) -> None:
    """Warn of labels of a column that look alike: in another case, or in other Unicode characters.

    An accented letter can be one character or two, depending on the system that wrote it.
    """
    alike: dict[str, str] = {}
    for label in sorted(set(labels)):
        key = unicodedata.normalize("NFKC", label)
        first = alike.setdefault(key.casefold(), label)
        if first == label:
            continue
        difference = "upper and lower case"
        shown = (repr(first), repr(label))
        if unicodedata.normalize("NFKC", first) == key:
            difference = "the Unicode characters that they are written with"
            shown = (ascii(first), ascii(label))
        _log.warning(
            "%scolumn %r has %s and %s, which differ only in %s; they are taken for different "
            "values",
            file_prefix(where),
            column,
            *shown,
            difference,
        )
        return


def read_column(rows: Rows, name: str, where: str) -> list[Any]:
    """Return a column's values.

    Raises:
        DataError: If a text in it was cut off in the middle of a character.
    """
    values = rows[name]
    for number, value in enumerate(values, start=1):
        surrogate = _lone_surrogate(value)
        if surrogate is not None:
            raise DataError(
                f"{file_prefix(where)}{rows.place(number)}: column {name!r} holds {surrogate!r}, "
                "half of a character that takes two (a lone surrogate): the text was cut within a "
                "character. Write the row again, or drop it"
            )
    return values


def _lone_surrogate(value: Any) -> str | None:
    """Return a lone surrogate (half a character) found in any text within a value, or None."""
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


def file_prefix(where: str) -> str:
    """Return the prefix of an error message about a file; empty without one."""
    return f"{where}: " if where else ""


def with_units(
    rows: Rows, examples: Sequence[Example], column: str | None, *, where: str
) -> list[Example]:
    """Return examples with the privacy units that a column names, or unchanged without a column.

    Raises:
        DataError: If there is no such column, or a row has no unit.
    """
    if column is None:
        return list(examples)
    units = column_texts(rows, column, where=where)
    warn_of_lookalikes(units, column, where)
    return [replace(example, unit=unit) for example, unit in zip(examples, units, strict=True)]
