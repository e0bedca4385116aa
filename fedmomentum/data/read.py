"""Turns a data set's rows into examples.

Errors name the file, the row (from 1, a CSV header not counted) and the column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmomentum.data.examples import MAX_CATEGORIES, MAX_LABEL, Example, Prompt, label_problem
from fedmomentum.data.rows import Rows
from fedmomentum.data.rows import read_rows as read_rows
from fedmomentum.errors import DataError
from fedmomentum.schema import printable

if TYPE_CHECKING:
    from datasets import Dataset

# Each format: the columns that give it away. `output` may be missing where `answer` stands in for it.
_FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "instruction+output": ("instruction", "output"),
    "question+answer": ("question", "answer"),
}


def to_examples(rows: Rows | Dataset, *, category_column: str | None = None, where: str = "") -> list[Example]:
    """Turn rows into examples; the columns decide the format, and no other column is read.

    - ``messages``: a chat whose last message is the assistant's: that is the completion, all before the prompt.
    - ``prompt`` and ``completion``: each text or a list of messages, the completion then holding one message, the
      assistant's.
    - ``instruction``, ``output`` and perhaps ``input``: one message of the user, the instruction, then a blank
      line and the input where it is not empty. An ``answer`` column counts only where there is no ``output``.
    - ``question`` and ``answer``: one message of the user, and the assistant's answer.

    Args:
        rows: As `read_rows` gives them.
        category_column: The column whose value becomes the example's category; None leaves it empty.
        where: Name of the file, for messages.

    Returns:
        One example a row, in the order of the rows.

    Raises:
        DataError: The columns fit no format or several, or a row has another shape (named).
    """
    rows = Rows.of(rows)
    kind = _detect(rows.column_names, where)
    names = _used(kind, rows.column_names)
    categories = column_texts(rows, category_column, where=where) if category_column else [""] * rows.num_rows
    if (count := len(set(categories))) > MAX_CATEGORIES:
        raise DataError(
            f"{_place(where)}column {category_column!r} has {count} different values, more than {MAX_CATEGORIES}; a "
            "category is what many rows have in common"
        )
    columns = [_column(rows, name, where) for name in names]
    examples = []
    for number, (category, *values) in enumerate(zip(categories, *columns, strict=True), start=1):
        try:
            prompt, completion = _parse(kind, dict(zip(names, values, strict=True)))
            examples.append(Example(prompt=prompt, completion=completion, category=category))
        except DataError as error:
            raise DataError(f"{_place(where)}row {number}: {error}") from None
    return examples


def column_texts(rows: Rows | Dataset, column: str, *, where: str = "") -> list[str]:
    """One column's labels as text: names of a ClassLabel, numbers written out.

    Args:
        rows: As `read_rows` gives them.
        column: Its name.
        where: Name of the file, for messages.

    Returns:
        One text a row, none empty, none longer than `MAX_LABEL` or with control characters: they are shown to
        people, and travel to the coordinator.

    Raises:
        DataError: There is no such column, or a row's value is missing or neither text nor a whole number, or of
            another kind than those before it.
    """
    rows = Rows.of(rows)
    if column not in rows.column_names:
        raise DataError(f"{_place(where)}no column {column!r}; found: {_listed(rows.column_names)}")
    labels = rows.label_names.get(column)
    texts, kinds = [], set[type]()
    for number, value in enumerate(_column(rows, column, where), start=1):
        place = f"{_place(where)}row {number}: column {column!r}"
        if labels is not None and type(value) is int:
            if not 0 <= value < len(labels):
                raise DataError(f"{place} is {value}, which is none of its {len(labels)} labels (-1: no label)")
            value = labels[value]
        if not isinstance(value, str | int) or not str(value).strip():
            raise DataError(f"{place} is {_shown(value)}; it must be text or a number")
        kinds.add(type(value))
        if len(kinds) > 1:
            raise DataError(
                f"{place} is {_shown(value)}, and rows before it hold another kind of value; a column must hold one "
                "kind of value in all rows, for 1 and '1' would be taken for the same"
            )
        if (problem := label_problem(str(value))) is not None:
            raise DataError(f"{place} {problem}; it must be a short name of at most {MAX_LABEL} characters")
        texts.append(str(value))
    return texts


def _column(rows: Rows, name: str, where: str) -> Iterable[Any]:
    """Return a column's values; refuse text that is no text."""
    values = rows[name]
    for number, value in enumerate(values, start=1):
        if (found := _lone_surrogate(value)) is not None:
            raise DataError(
                f"{_place(where)}row {number}: column {name!r} holds {found!r}, half of a character that takes two "
                "(a lone surrogate): the text was cut within a character. Write the row anew, or drop it"
            )
    return values


def _lone_surrogate(value: Any) -> str | None:
    """Return a character that is half of one, from a text or from any text in a list or an object."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError as error:
                return one[error.start]
        elif isinstance(one, Mapping):
            waiting.extend(one.keys())
            waiting.extend(one.values())
        elif isinstance(one, list | tuple):
            waiting.extend(one)
    return None


def _used(kind: str, columns: Sequence[str]) -> list[str]:
    """Return the columns that a format takes its prompts and answers from."""
    if kind != "instruction+output":
        return list(_FORMATS[kind])
    answer = "output" if "output" in columns else "answer"
    return ["instruction", answer, *(name for name in ("input",) if name in columns)]


def _place(where: str) -> str:
    return f"{where}: " if where else ""


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names))


def _shown(value: Any) -> str:
    """Return a value of the data for a message: one line, and not all of a long text."""
    return printable(repr(value), 100)


def _detect(columns: Sequence[str], where: str) -> str:
    present = set(columns)
    if "instruction" in present and "answer" in present:
        present.add("output")
    kinds = [kind for kind, needed in _FORMATS.items() if present.issuperset(needed)]
    if len(kinds) == 1:
        return kinds[0]
    trouble = f"fit several formats ({', '.join(kinds)})" if kinds else "fit no known format"
    remedy = "remove the columns of the others" if kinds else "rename them"
    raise DataError(
        f"{_place(where)}the columns {_listed(columns)} {trouble}; {remedy}. Known: messages; prompt, "
        "completion; instruction, output (and input); question, answer"
    )


def _parse(kind: str, row: Mapping[str, Any]) -> tuple[Prompt, str]:
    if kind == "messages":
        messages = _messages(row["messages"], "messages")
        return _user_turns(messages[:-1]), _assistant_text(messages[-1])
    if kind == "prompt+completion":
        prompt, completion = row["prompt"], row["completion"]
        return (
            prompt if isinstance(prompt, str) else _user_turns(_messages(prompt, "prompt")),
            completion if isinstance(completion, str) else _completion_turn(_messages(completion, "completion")),
        )
    if kind == "question+answer":
        return _question(_text(row, "question")), _text(row, "answer")
    instruction = _text(row, "instruction")
    context = "" if row.get("input") is None else _text(row, "input", may_be_empty=True)
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return _question(question), _text(row, "output" if "output" in row else "answer")


def _question(text: str) -> Prompt:
    return ({"role": "user", "content": text},)


def _text(row: Mapping[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"column {column!r} is {_shown(value)}; it must be text")
    if not value.strip() and not may_be_empty:
        raise DataError(f"column {column!r} is empty; fill it in or drop the row")
    return value


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} must be a list of messages (role, content); got {_shown(value)}")
    messages = []
    for position, message in enumerate(value, start=1):
        # Arrow fills the keys that only other rows' messages have with None.
        fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else None
        if fields is None or set(fields) != {"role", "content"}:
            raise DataError(
                f"column {column!r}, message {position}: must have exactly role and content; got {_shown(message)}"
            )
        messages.append(fields)
    return messages


def _user_turns(messages: list[dict[str, str]]) -> Prompt:
    if not messages:
        raise DataError(
            "nothing stands before the answer; a chat needs at least one message before the assistant's last"
        )
    return tuple(messages)


def _assistant_text(message: Mapping[str, str]) -> str:
    if message["role"] != "assistant":
        raise DataError(
            f"the last message must be the assistant's, the answer to learn; its role is {_shown(message['role'])}"
        )
    return message["content"]


def _completion_turn(messages: list[dict[str, str]]) -> str:
    if len(messages) != 1:
        raise DataError(f"column 'completion' must hold one message, the assistant's; it holds {len(messages)}")
    return _assistant_text(messages[0])
