"""Which columns of a data set are read, and as what: row formats and user-defined column names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmomentum.config.columns import COLUMNS
from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

FORMATS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "history")),
    "conversations": (("conversations",), ("system", "history")),
    "prompt+completion": (("prompt", "completion"), ("system", "input", "context", "history")),
    "chosen+rejected": (
        ("chosen", "rejected"),
        ("prompt", "system", "input", "context", "history"),
    ),
    "instruction+output": (("instruction", "output"), ("input", "context", "system", "history")),
    "instruction+response": (
        ("instruction", "response"),
        ("context", "input", "system", "history"),
    ),
    "question+answer": (("question", "answer"), ("context", "system", "input", "history")),
    "text": (("text",), ()),
}
"""Format -> the columns that identify it, and the optional ones that it reads if present.

Some optional columns must be empty, since they belong to the prompt and cannot be a part of it.
`answer` may replace `output`; `text` is used only if no other format fits.
"""


@dataclass(frozen=True)
class RowFormat:
    """How to read rows.

    Attributes:
        kind: One of `FORMATS`.
        names: Our name of each column that is read -> the file's name.
    """

    kind: str
    names: Mapping[str, str]


def find_format(columns: Sequence[str], mapping: Mapping[str, str], where: str) -> RowFormat:
    """Return the one format that the columns fit.

    Args:
        columns: The file's columns.
        mapping: Our column names -> the file's; an empty name means the column is not used.
        where: Name of the file, for error messages.

    Raises:
        DataError: If the columns fit no format or several, or a mapped column is missing.
    """
    names = resolve_names(columns, mapping, where)
    # Names given by the user decide, if they identify a format.
    given = {ours for ours, theirs in mapping.items() if theirs}
    kinds = [kind for kind, (needed, _) in FORMATS.items() if given.issuperset(needed)]
    if not kinds:
        present = set(names)
        if "instruction" in present and "answer" in present:
            present.add("output")
        kinds = [kind for kind, (needed, _) in FORMATS.items() if present.issuperset(needed)]
    # Data sets often also have a column with the whole row as one text.
    if kinds != ["text"]:
        kinds = [kind for kind in kinds if kind != "text"]
    elif "label" in names and "text" not in given:
        kinds = []
    if len(kinds) != 1:
        raise DataError(_misfit(columns, names, kinds, where))
    (kind,) = kinds
    needed, optional = FORMATS[kind]
    if kind == "instruction+output" and "output" not in names:
        needed = ("instruction", "answer")
    return RowFormat(kind, {ours: names[ours] for ours in (*needed, *optional) if ours in names})


def resolve_names(columns: Sequence[str], mapping: Mapping[str, str], where: str) -> dict[str, str]:
    """Return a mapping from our names of the columns that a file has to the file's names.

    Raises:
        DataError: If the file lacks a mapped column.
    """
    prefix = f"{where}: " if where else ""
    for ours, theirs in mapping.items():
        if theirs and theirs not in columns:
            raise DataError(
                f"{prefix}no column {printable(theirs)!r}, which [data.columns] gives for {ours}; "
                f"correct it there, or rename the column; found: {join_names(columns)}"
            )
    # A column that is mapped to one of our names is not also used under its own name.
    names = {}
    for name in columns:
        if name in COLUMNS and name not in mapping and name not in mapping.values():
            names[name] = name
    names.update((ours, theirs) for ours, theirs in mapping.items() if theirs)
    return names


def _misfit(
    columns: Sequence[str], names: Mapping[str, str], kinds: Sequence[str], where: str
) -> str:
    """Return the error message for columns that fit no format, or several."""
    prefix = f"{where}: " if where else ""
    problem = (
        "fit no known format; rename them, or say in [data.columns] which is which, such as "
        'question = "..." and answer = "..."'
    )
    if "label" in names and ("text" in names or "text_a" in names):
        problem += ', or train a classifier on them (model.task = "sequence-classification")'
    if kinds:
        unused = FORMATS[kinds[-1]][0][0]
        problem = (
            f"fit several formats ({', '.join(kinds)}); remove the columns of the others, or leave "
            f'one out by [data.columns], such as {unused} = ""'
        )
    return (
        f"{prefix}the columns {join_names(columns)} {problem}. Known: messages; prompt, "
        "completion; chosen, rejected (and prompt); instruction, output (and input); instruction, "
        "response (and context); question, answer (and context); conversations; text alone"
    )


def join_names(names: Sequence[str]) -> str:
    """Format column names for an error message."""
    return printable(", ".join(names))
