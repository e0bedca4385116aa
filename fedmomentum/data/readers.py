"""Converts a data set's rows into examples.

Errors name the file, the row (counted from 1, without a CSV header) and the column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from fedmomentum.data.columns import find_format, resolve_names
from fedmomentum.data.examples import MAX_CATEGORIES, Example
from fedmomentum.data.label_columns import (
    column_texts,
    file_prefix,
    read_column,
    warn_of_lookalikes,
)
from fedmomentum.data.row_formats import Cells, is_empty, parse_row
from fedmomentum.data.rows import Rows
from fedmomentum.data.rows import read_rows as read_rows
from fedmomentum.errors import DataError
from fedmomentum.utils.text import short_repr

if TYPE_CHECKING:
    from datasets import Dataset

_TOOLS = ("definitions of tools", "Write them into the system message")
TEMPLATE_COLUMNS = {
    "tools": _TOOLS,
    "functions": _TOOLS,
    "chat_template_kwargs": (
        "arguments of the chat template",
        "Use a model whose template has these values as its defaults",
    ),
}
"""Columns that other trainers pass to the chat template -> what they hold, and what to do."""


def to_examples(
    rows: Rows | Dataset,
    *,
    category_column: str | None = None,
    where: str = "",
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """Convert rows into examples; the columns determine the format, and others are not read.

    - ``messages`` or ``conversations``: a chat whose last message, the assistant's, is the
      completion; all messages before it are the prompt. Messages have `role` and `content`, or
      ShareGPT's `from` and `value`; see `chats`.
    - ``prompt`` and ``completion``: each is text or a list of messages; a completion's list holds
      a single assistant message. Those in the prompt are not learned, unless they have weights.
    - ``prompt``, ``chosen`` and ``rejected``: the same with two answers, the first preferred. If
      the two are whole chats that differ in their last message, the messages before it are the
      prompt, and the ``prompt`` column is optional.
    - ``instruction``, ``output`` and optionally ``input``: one user message with the instruction,
      followed by a blank line and the input unless it is empty. An ``answer`` column is used only
      if there is no ``output``, and a ``context`` is read like an ``input``. The same for
      ``instruction``, ``response`` and optional ``context`` or ``input``.
    - ``question``, ``answer`` and optionally ``context``: the same.
    - ``text``, if no other format fits: no prompt, and the entire text is learned.

    A ``system`` column alongside messages, an instruction or a question is the system message;
    alongside a prompt that is plain text it is refused. So are columns that belong to the prompt
    and cannot be a part of it, unless they are empty: ``history``; ``input`` and ``context``
    alongside a prompt, and ``input`` alongside a question; and what other trainers pass to the chat
    template (`TEMPLATE_COLUMNS`).

    Args:
        rows: The rows, from `read_rows`.
        category_column: The column that becomes the example's category; None leaves it empty.
        where: Name of the file, for error messages.
        columns: Our column names -> the file's, as in `data.columns`.

    Returns:
        One example per row, in row order.

    Raises:
        DataError: If the columns fit no format or several, or a row is malformed (the message names
            it).
    """
    # Find the columns to read.
    rows = Rows.of(rows)
    form = find_format(rows.column_names, columns or {}, where)
    if form.kind != "text":
        _refuse_template_columns(rows, form.names.values(), where)
    if form.kind == "prompt+completion":
        names = resolve_names(rows.column_names, columns or {}, where)
        _refuse_verdicts(rows, names.get("label"), where)
    categories = [""] * rows.num_rows
    if category_column:
        categories = column_texts(rows, category_column, where=where)
        warn_of_lookalikes(categories, category_column, where)
    num_categories = len(set(categories))
    if num_categories > MAX_CATEGORIES:
        raise DataError(
            f"{file_prefix(where)}column {category_column!r} has {num_categories} different "
            f"values, more than {MAX_CATEGORIES}; a category is what many rows have in common"
        )
    # Row by row, so that error messages can name the row.
    values_by_column = [read_column(rows, name, where) for name in form.names.values()]
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
            raise DataError(f"{file_prefix(where)}{rows.place(number)}: {error}") from None
    return examples


def _refuse_template_columns(rows: Rows, used: Collection[str], where: str) -> None:
    """Reject columns that other trainers pass to the chat template, which writes them into chats.

    Args:
        rows: The rows.
        used: The columns that are read as something else.
        where: Name of the file, for error messages.

    Raises:
        DataError: If a row has such a value.
    """
    for column, (what, advice) in TEMPLATE_COLUMNS.items():
        if column not in rows.column_names or column in used:
            continue
        for number, value in enumerate(read_column(rows, column, where), start=1):
            if not is_empty(value):
                raise DataError(
                    f"{file_prefix(where)}{rows.place(number)}: column {column!r} holds "
                    f"{short_repr(value)}; {what} are not supported, and left out they would be "
                    f"missing from the prompt. {advice}, or remove the column"
                )


def _refuse_verdicts(rows: Rows, column: str | None, where: str) -> None:
    """Reject completions that are labeled as good or bad, as in TRL's unpaired preferences."""
    if column is None:
        return
    for number, value in enumerate(read_column(rows, column, where), start=1):
        is_verdict = isinstance(value, bool) or str(value).strip().lower() in ("true", "false")
        if is_verdict:
            raise DataError(
                f"{file_prefix(where)}{rows.place(number)}: column {column!r} is "
                f"{short_repr(value)}; completions that are labeled as good or bad are not "
                "supported, and the bad would be learned like the good. Give pairs of chosen and "
                "rejected answers, or keep the "
                'rows with good completions and leave the column out: [data.columns] label = ""'
            )
