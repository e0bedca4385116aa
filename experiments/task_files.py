"""Files of prompts and completions from local copies of the public data sets.

A data directory holds one directory a set, with the splits as the authors publish them: `gsm8k`
with train.jsonl and test.jsonl (`question`, `answer`); the multiple-choice sets with train.json and
test.json in the layout of LLM-Adapters (`instruction`, `input`, `output`, `answer`); `code` with
train.jsonl and test.jsonl (`instruction`, `input`, `output`). Every row is checked.
"""

import json
import random
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

CHOICE_SETS = (
    "boolq",
    "piqa",
    "siqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
"""The eight sets of LLM-Adapters."""
SETS = {"maths": ("gsm8k",), "commonsense": CHOICE_SETS, "code": ("code",)}
"""The sets of a task; those that are there are used."""
T = TypeVar("T")
ANSWER = "the correct answer is "


class _Solved(msgspec.Struct):
    """A row of gsm8k."""

    question: str
    answer: str


class _Instruction(msgspec.Struct):
    """A row in the layout of LLM-Adapters, which is Alpaca's."""

    instruction: str
    output: str
    input: str = ""


@dataclass(frozen=True)
class Row:
    """An example as the package reads it, with what its clients are divided by."""

    prompt: str
    completion: str
    category: str


class DataMissing(SystemExit):
    """No set of a task is there, or a file of a set cannot be read."""


def present(task: str, data: Path) -> tuple[list[str], list[str]]:
    """Return the sets of a task that are in the data directory, and those that are not."""
    found: list[str] = []
    missing: list[str] = []
    for name in SETS[task]:
        is_there = all(_file(data / name, split) is not None for split in ("train", "test"))
        (found if is_there else missing).append(name)
    return found, missing


def read_task(task: str, data: Path, split: str) -> list[Row]:
    """Return the examples of all sets of a task that are there.

    Raises:
        DataMissing: If there is no set, or a row is not as expected.
    """
    found, missing = present(task, data)
    if not found:
        raise DataMissing(
            f"no data for {task}: {data} has none of {', '.join(missing)} with train and test files"
        )
    rows: list[Row] = []
    for name in found:
        rows += _read_set(name, data / name, split)
    return rows


def sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return some of the rows, equally many of each category where there are enough."""
    by_category: dict[str, list[Row]] = {}
    for row in rows:
        by_category.setdefault(row.category, []).append(row)
    generator = random.Random(seed)
    for members in by_category.values():
        generator.shuffle(members)
    chosen: list[Row] = []
    # One of each in turn, so that a small category is used up before the others fill its place.
    for place in range(max(map(len, by_category.values()))):
        for category in sorted(by_category):
            if place < len(by_category[category]) and len(chosen) < count:
                chosen.append(by_category[category][place])
    return chosen


def write_rows(rows: list[Row], file: Path) -> None:
    """Write rows as JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read_rows(file: Path) -> list[Row]:
    """Read what `write_rows` wrote."""
    return [msgspec.json.decode(line, type=Row) for line in file.read_bytes().splitlines()]


def choices(row: Row) -> list[str]:
    """Return the completions that a multiple-choice question allows; none for other questions."""
    named = re.search(r"Answer format: (\S+(?:/\S+)+)\s*$", row.prompt)
    return [f"{ANSWER}{choice}" for choice in named[1].split("/")] if named else []


# ── one set ───────────────────────────────────────────────────────────────────────────────────────


def _file(directory: Path, split: str) -> Path | None:
    for ending in ("jsonl", "json"):
        file = directory / f"{split}.{ending}"
        if file.is_file():
            return file
    return None


def _read_set(name: str, directory: Path, split: str) -> list[Row]:
    file = _file(directory, split)
    assert file is not None
    try:
        if name == "gsm8k":
            return [_solved(row) for row in _decode(file, _Solved)]
        rows = _decode(file, _Instruction)
    except msgspec.MsgspecError as error:
        raise DataMissing(f"{file}: {error}") from None
    categories = _by_length(rows) if name == "code" else [name] * len(rows)
    return [_instructed(row, category) for row, category in zip(rows, categories, strict=True)]


def _decode(file: Path, kind: type[T]) -> list[T]:
    """Read a JSON list or JSON Lines."""
    data = file.read_bytes()
    if file.suffix == ".json":
        return msgspec.json.decode(data, type=list[kind])  # type: ignore[valid-type]
    decoder = msgspec.json.Decoder(kind)
    return [decoder.decode(line) for line in data.splitlines() if line.strip()]


def _solved(row: _Solved) -> Row:
    """Return a maths question; its category is the number of calculations in its solution."""
    num_calculations = min(max(row.answer.count("<<"), 1), 6)
    return Row(
        f"Question: {row.question.strip()}\nAnswer:\n",
        row.answer.strip(),
        f"{num_calculations} calculations",
    )


def _instructed(row: _Instruction, category: str) -> Row:
    more = f"\n{row.input.strip()}" if row.input.strip() else ""
    return Row(f"{row.instruction.strip()}{more}\n", row.output.strip(), category)


def _by_length(rows: list[_Instruction]) -> list[str]:
    """Return for each row the quarter, by the length of the answer, that it belongs to."""
    lengths = [len(row.output) for row in rows]
    limits = statistics.quantiles(lengths, n=4) if len(lengths) > 1 else []
    return [f"length {1 + sum(length > limit for limit in limits)}" for length in lengths]
