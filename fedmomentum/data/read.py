"""Reads users' files and turns their rows into examples.

JSON lines, JSON, CSV and Parquet files, folders written by ``datasets.save_to_disk``, and data sets of the
Hugging Face hub. No pickle is read and no code that comes with the data is run. Errors name the file and the row
(from 1, a CSV header not counted) or, where the file itself is broken, the line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.data.examples import Example, Prompt
from fedmomentum.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset  # heavy: imported where rows are read

FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")

# Each format: the columns that give it away. `output` may be missing where `answer` stands in for it.
_FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "instruction+output": ("instruction", "output"),
    "question+answer": ("question", "answer"),
}


def read_rows(source: str | Path, *, split: str = "train") -> Dataset:
    """Read a data set.

    Args:
        source: A ``.jsonl``, ``.json`` (a list of objects, or one object a line), ``.csv`` (UTF-8, with a header;
            all values are text) or ``.parquet`` file; a folder written by ``datasets.save_to_disk``; or a hub
            name.
        split: Which split of a folder with several or of a hub data set; files have none and ignore it.

    Returns:
        The rows; columns that a JSON row lacks are None.

    Raises:
        DataError: It does not exist, is empty, cannot be reached, or a row is broken (named).
    """
    path = Path(source)
    if path.is_dir():
        rows = _read_folder(path, split)
    elif path.is_file():
        rows = _read_file(path)
    elif path.suffix in FILE_ENDINGS or path.is_absolute() or str(source).startswith((".", "~")):
        raise DataError(f"{source}: no such file or folder")
    else:
        rows = _read_hub(str(source), split)
    if not rows.num_rows or not rows.column_names:
        raise DataError(f"{source}: no rows; an empty data set cannot be used")
    return rows


def to_examples(rows: Dataset, *, category_column: str | None = None, where: str = "") -> list[Example]:
    """Turn rows into examples; the columns decide the format.

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
    columns = rows.column_names
    kind = _detect(columns, where)
    categories = column_texts(rows, category_column, where=where) if category_column else [""] * rows.num_rows
    examples = []
    for number, (row, category) in enumerate(zip(rows, categories, strict=True), start=1):
        try:
            prompt, completion = _parse(kind, row)
            examples.append(Example(prompt=prompt, completion=completion, category=category))
        except DataError as error:
            raise DataError(f"{_place(where)}row {number}: {error}") from None
    return examples


def column_texts(rows: Dataset, column: str, *, where: str = "") -> list[str]:
    """One column's labels as text: names of a ClassLabel, numbers written out.

    Args:
        rows: As `read_rows` gives them.
        column: Its name.
        where: Name of the file, for messages.

    Returns:
        One text a row, none empty.

    Raises:
        DataError: There is no such column, or a row's value is missing or neither text nor a whole number.
    """
    from datasets import ClassLabel

    if column not in rows.column_names:
        raise DataError(f"{_place(where)}no column {column!r}; found: {', '.join(rows.column_names)}")
    feature = rows.features[column]
    texts = []
    for number, value in enumerate(rows[column], start=1):
        if isinstance(feature, ClassLabel) and isinstance(value, int) and value >= 0:
            value = feature.int2str(value)
        if not isinstance(value, str | int) or not str(value).strip():
            raise DataError(f"{_place(where)}row {number}: column {column!r} is {value!r}; it must be text or a number")
        texts.append(str(value))
    return texts


def _place(where: str) -> str:
    return f"{where}: " if where else ""


def _read_file(path: Path) -> Dataset:
    if path.suffix not in FILE_ENDINGS:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without ending'}; known: {', '.join(FILE_ENDINGS)}"
        )
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: empty file; an empty data set cannot be used")
    if path.suffix == ".csv":
        return _from_columns(_csv_columns(path, text), path)
    objects = _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    names = list(dict.fromkeys(name for row in objects for name in row))
    return _from_columns({name: [row.get(name) for row in objects] for name in names}, path)


def _json_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(f"{path}, row {number}: must be an object with named columns; got {type(value).__name__}")
    return values


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    objects = []
    # Only \n ends a line: JSON strings may hold other characters that str.splitlines takes for line ends.
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not valid JSON: {error.msg}; wanted one object a line"
                + ("" if path.suffix == ".jsonl" else ", or a list of objects")
            ) from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: must be an object with named columns; got {type(value).__name__}")
        objects.append(value)
    return objects


def _csv_columns(path: Path, text: str) -> dict[str, list[str]]:
    reader = csv.reader(io.StringIO(text.rstrip("\n"), newline=""), strict=True)
    try:
        header = next(reader)
        if len(set(header)) != len(header) or not all(header):
            raise DataError(f"{path}: the header must name each column once; got {header}")
        records = []
        for record in reader:
            if len(record) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(record)} values for {len(header)} columns; "
                    "put values that hold a comma or a line end in double quotes"
                )
            records.append(record)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
    return {name: [record[position] for record in records] for position, name in enumerate(header)}


def _from_columns(columns: Mapping[str, Sequence[Any]], path: Path) -> Dataset:
    import pyarrow
    from datasets import Dataset

    for name, values in columns.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
            kinds = [None if value is None else type(value) for value in values]
            first = next(kind for kind in kinds if kind)
            other = next((row for row, kind in enumerate(kinds, start=1) if kind not in (None, first)), None)
            row = "" if other is None else f", row {other}"
            raise DataError(f"{path}{row}: column {name!r} must hold one kind of value in all rows: {error}") from None
    return Dataset.from_dict(dict(columns))


def _read_parquet(path: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        return Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _read_folder(path: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{path}: a folder without a saved data set; name one file in it, or write one with save_to_disk"
        )
    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a readable saved data set: {error}") from None
    if not isinstance(found, DatasetDict):
        return found.with_format(None)
    if split not in found:
        raise DataError(f"{path}: no split {split!r}; found: {', '.join(found)}")
    return found[split].with_format(None)


def _read_hub(name: str, split: str) -> Dataset:
    from datasets import Dataset, load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many kinds; each means that there are no rows
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{name}: no such file here, and the data set of that name on the Hugging Face hub could not be loaded "
            f"(split {split!r}): {reason}; check the name and the connection, or download it and name the file"
        ) from None
    if not isinstance(rows, Dataset):
        raise DataError(f"{name}: split {split!r} gives {type(rows).__name__}; name one split, such as 'train'")
    return rows


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
        f"{_place(where)}the columns {', '.join(columns)} {trouble}; {remedy}. Known: messages; prompt, "
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
        raise DataError(f"column {column!r} is {value!r}; it must be text")
    if not value.strip() and not may_be_empty:
        raise DataError(f"column {column!r} is empty; fill it in or drop the row")
    return value


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} must be a list of messages (role, content); got {value!r}")
    messages = []
    for position, message in enumerate(value, start=1):
        # Arrow fills the keys that only other rows' messages have with None.
        fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else None
        if fields is None or set(fields) != {"role", "content"}:
            raise DataError(
                f"column {column!r}, message {position}: must have exactly role and content; got {message!r}"
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
            f"the last message must be the assistant's, the answer to learn; its role is {message['role']!r}"
        )
    return message["content"]


def _completion_turn(messages: list[dict[str, str]]) -> str:
    if len(messages) != 1:
        raise DataError(f"column 'completion' must hold one message, the assistant's; it holds {len(messages)}")
    return _assistant_text(messages[0])
