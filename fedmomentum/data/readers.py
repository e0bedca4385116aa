"""Converts a data set's rows into examples.

Errors name the file, the row (from 1, a CSV header not counted) and the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmomentum.data.examples import (
    MAX_CATEGORIES,
    MAX_LABEL,
    Example,
    Message,
    Prompt,
    keys_problem,
    label_problem,
)
from fedmomentum.data.rows import Rows
from fedmomentum.data.rows import read_rows as read_rows
from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from datasets import Dataset


# Each format with the columns that identify it. `output` may be missing where `answer` replaces it.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "chosen+rejected": ("chosen", "rejected"),
    "instruction+output": ("instruction", "output"),
    "question+answer": ("question", "answer"),
}


def to_examples(
    rows: Rows | Dataset, *, category_column: str | None = None, where: str = ""
) -> list[Example]:
    """Convert rows into examples; the columns decide the format, and no other column is read.

    - ``messages``: a chat whose last message is the assistant's: that is the completion, all
      messages before it are the prompt.
    - ``prompt`` and ``completion``: each text or a list of messages, the completion then holding
      one message, the assistant's.
    - ``prompt``, ``chosen`` and ``rejected``: the same with two answers, of which the first is
      preferred. Where these two are whole chats that differ in their last message, the messages
      before it are the prompt, and the column ``prompt`` may be missing.
    - ``instruction``, ``output`` and perhaps ``input``: one message of the user, the instruction,
      then a blank line and the input where it is not empty. An ``answer`` column counts only where
      there is no ``output``.
    - ``question`` and ``answer``: one message of the user, and the assistant's answer.

    Args:
        rows: The rows, from `read_rows`.
        category_column: The column whose value becomes the example's category; None leaves it
            empty.
        where: Name of the file, for messages.

    Returns:
        One example a row, in the order of the rows.

    Raises:
        DataError: If the columns fit no format or several, or a row has another shape (named).
    """
    # Which columns count.
    rows = Rows.of(rows)
    kind = _detect_format(rows.column_names, where)
    names = _used_columns(kind, rows.column_names)
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
    columns = [_column(rows, name, where) for name in names]
    examples = []
    for number, (category, *values) in enumerate(zip(categories, *columns, strict=True), start=1):
        row = dict(zip(names, values, strict=True))
        try:
            prompt, completion, rejected = _parse_row(kind, row)
            example = Example(prompt, completion, category, rejected=rejected, source_row=number)
            examples.append(example)
        except DataError as error:
            raise DataError(f"{_prefix(where)}row {number}: {error}") from None
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
        known = _join_names(rows.column_names)
        raise DataError(f"{_prefix(where)}no column {column!r}; found: {known}")
    label_names = rows.label_names.get(column)
    texts = []
    kinds: set[type] = set()
    for number, value in enumerate(_column(rows, column, where), start=1):
        place = f"{_prefix(where)}row {number}: column {column!r}"
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
                f"{_prefix(where)}row {number}: column {name!r} holds {surrogate!r}, half of a "
                "character that takes two (a lone surrogate): the text was cut within a "
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


# ── formats ───────────────────────────────────────────────────────────────────────────────────────


def _detect_format(columns: Sequence[str], where: str) -> str:
    """Return the one format that the columns fit."""
    present = set(columns)
    if "instruction" in present and "answer" in present:
        present.add("output")
    kinds = [kind for kind, needed in FORMATS.items() if present.issuperset(needed)]
    if len(kinds) == 1:
        return kinds[0]
    problem = "fit no known format; rename them"
    if "label" in present and ("text" in present or "text_a" in present):
        problem += ', or train a classifier on them (model.task = "sequence-classification")'
    if kinds:
        problem = f"fit several formats ({', '.join(kinds)}); remove the columns of the others"
    raise DataError(
        f"{_prefix(where)}the columns {_join_names(columns)} {problem}. Known: messages; prompt, "
        "completion; chosen, rejected (and prompt); instruction, output (and input); question, "
        "answer"
    )


def _used_columns(kind: str, columns: Sequence[str]) -> list[str]:
    """Return the columns from which a format takes its prompts and answers."""
    if kind == "chosen+rejected" and "prompt" in columns:
        return ["prompt", "chosen", "rejected"]
    if kind != "instruction+output":
        return list(FORMATS[kind])
    names = ["instruction", "output" if "output" in columns else "answer"]
    if "input" in columns:
        names.append("input")
    return names


def _refuse_tools(rows: Rows, where: str) -> None:
    """Refuse a column of tool definitions, which chat templates would write into the chat."""
    if "tools" not in rows.column_names:
        return
    for number, value in enumerate(_column(rows, "tools", where), start=1):
        if value:
            raise DataError(
                f"{_prefix(where)}row {number}: column 'tools' holds {_shown(value)}; definitions "
                "of tools are not supported, and left out they would be missing from the prompt. "
                "Write them into the system message, or remove the column"
            )


def _parse_row(kind: str, row: Mapping[str, Any]) -> tuple[Prompt, str, str | None]:
    """Return the prompt and the answer of a row, and the rejected answer where it has one."""
    if kind == "messages":
        messages = _messages(row["messages"], "messages")
        return _prompt_messages(messages[:-1]), _assistant_text(messages[-1]), None
    if kind == "prompt+completion":
        return _parse_prompt(row["prompt"]), _parse_answer(row, "completion"), None
    if kind == "chosen+rejected":
        return _parse_pair(row)
    if kind == "question+answer":
        return _user_message(_text(row, "question")), _text(row, "answer"), None
    instruction = _text(row, "instruction")
    context = ""
    if row.get("input") is not None:
        context = _text(row, "input", may_be_empty=True)
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    answer_column = "output" if "output" in row else "answer"
    return _user_message(question), _text(row, answer_column), None


def _parse_prompt(value: Any) -> Prompt:
    """Return the column ``prompt``: text or messages."""
    if isinstance(value, str):
        return value
    return _prompt_messages(_messages(value, "prompt"))


def _parse_answer(row: Mapping[str, Any], column: str) -> str:
    """Return a column that holds an answer: text, or one message of the assistant."""
    value = row[column]
    if isinstance(value, str):
        return value
    messages = _messages(value, column)
    if len(messages) != 1:
        raise DataError(
            f"column {column!r} must hold one message, the assistant's; it holds {len(messages)}: "
            "move those before the answer to the column 'prompt'"
        )
    return _assistant_text(messages[0])


def _parse_pair(row: Mapping[str, Any]) -> tuple[Prompt, str, str]:
    """Return the prompt and both answers of a preference."""
    answers = [row["chosen"], row["rejected"]]
    are_chats = all(isinstance(answer, list) and len(answer) > 1 for answer in answers)
    if are_chats:
        return _parse_pair_of_chats(row)
    if row.get("prompt") is None:
        raise DataError(
            "there is no prompt: name it in the column 'prompt', or give 'chosen' and 'rejected' "
            "as whole chats, lists of messages that differ in the last one"
        )
    prompt = _parse_prompt(row["prompt"])
    return prompt, _parse_answer(row, "chosen"), _parse_answer(row, "rejected")


def _parse_pair_of_chats(row: Mapping[str, Any]) -> tuple[Prompt, str, str]:
    """Return what two chats have in common, and the answers in which they end."""
    chosen = _messages(row["chosen"], "chosen")
    rejected = _messages(row["rejected"], "rejected")
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise DataError(
            "the chats in 'chosen' and 'rejected' differ before their last message; a preference "
            "is between two answers to the same prompt"
        )
    # A column that repeats the prompt must say the same: as messages, or as the text of one.
    prompt = row.get("prompt")
    if prompt is not None:
        texts = [message["content"] for message in context]
        is_same = prompt in texts if isinstance(prompt, str) else prompt == context
        if not is_same:
            raise DataError(
                f"column 'prompt' is {_shown(prompt)}, which the chats in 'chosen' and 'rejected' "
                "do not hold before their last message; remove the column, or correct it"
            )
    return _prompt_messages(context), _assistant_text(chosen[-1]), _assistant_text(rejected[-1])


def _user_message(text: str) -> Prompt:
    """Return a chat of one message of the user."""
    return ({"role": "user", "content": text},)


def _text(row: Mapping[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    """Return a column's text."""
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"column {column!r} is {_shown(value)}; it must be text")
    if not value.strip() and not may_be_empty:
        raise DataError(f"column {column!r} is empty; fill it in or drop the row")
    return value


def _messages(value: Any, column: str) -> list[Message]:
    """Return a column's messages."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"column {column!r} must be a list of messages (role, content); got {_shown(value)}"
        )
    messages = []
    for position, message in enumerate(value, start=1):
        if isinstance(message, Mapping):
            # Arrow fills the keys that only other rows' messages have with None.
            fields: Message = {key: item for key, item in message.items() if item is not None}
            # Who calls a tool need not say anything.
            if "tool_calls" in fields:
                fields.setdefault("content", "")
            message = fields
        problem = keys_problem(message)
        if problem is not None:
            raise DataError(f"column {column!r}, message {position}: {problem}")
        messages.append(message)
    return messages


def _prompt_messages(messages: list[Message]) -> Prompt:
    """Return the messages before the answer as a prompt."""
    if not messages:
        raise DataError(
            "nothing stands before the answer; a chat needs at least one message before the "
            "assistant's last"
        )
    return tuple(messages)


def _assistant_text(message: Message) -> str:
    """Return the text of the message that is the answer."""
    if message["role"] != "assistant":
        raise DataError(
            "the last message must be the assistant's, the answer to learn; its role is "
            f"{_shown(message['role'])}"
        )
    others = sorted(message.keys() - {"role", "content"})
    if others:
        raise DataError(
            f"the last message, the answer to learn, holds {', '.join(others)}; it must be text "
            "alone: end the chat with the assistant's answer"
        )
    return str(message["content"])


# ── messages to the user ──────────────────────────────────────────────────────────────────────────


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def _join_names(names: Sequence[str]) -> str:
    return printable(", ".join(names))


def _shown(value: Any) -> str:
    """Return a value of the data for a message: one line, and cut where it is long."""
    return printable(repr(value), 100)
