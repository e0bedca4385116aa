"""Common file formats, and how each is read; the table in docs/data.md is generated from these.

`python -m tests.data.format_cases` writes the table.
"""

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import openpyxl
import pyarrow
import pyarrow.parquet

from fedmomentum.config.data import DataConfig
from fedmomentum.data.client_data import read_source
from fedmomentum.data.columns import find_format

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
MARKS = ("<!-- formats: made by `python -m tests.data.format_cases` -->", "<!-- end -->")


@dataclass(frozen=True)
class Case:
    """A file as users have it.

    Attributes:
        title: What it is.
        name: The file's name.
        content: Its bytes, or a function that writes it.
        prompt: The prompt that its first row must give, a line a message.
        answer: The answer that its first row must give.
        columns: `data.columns`.
    """

    title: str
    name: str
    content: bytes | Callable[[Path], None]
    prompt: str
    answer: str
    columns: dict[str, str] = field(default_factory=dict)


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def workbook(path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (
        ["question", "answer"],
        ["What is 6 times 7?", 42],
        [None, None],
        ["Is it?", "yes"],
    ):
        book.active.append(row)
    book.save(path)


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"question": "Q?", "answer": "A"}]), path
    )


CHAT = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]
CASES = [
    Case("chats", "chats.jsonl", lines({"messages": CHAT}), "user: Q?", "A"),
    Case(
        "ShareGPT",
        "sharegpt.json",
        json.dumps(
            [
                {
                    "id": "x1",
                    "conversations": [
                        {"from": "system", "value": "Be brief."},
                        {"from": "human", "value": "Q?"},
                        {"from": "gpt", "value": "A"},
                    ],
                }
            ]
        ).encode(),
        "system: Be brief. / user: Q?",
        "A",
    ),
    Case(
        "OpenAI fine-tuning: weights, names, content in parts",
        "openai.jsonl",
        lines(
            {
                "messages": [
                    {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Q?"}]},
                    {"role": "assistant", "content": "hm", "weight": 0},
                    {"role": "user", "content": "Well?"},
                    {"role": "assistant", "content": "A", "weight": 1},
                ]
            }
        ),
        "user: Q? / assistant: hm / user: Well?",
        "A",
    ),
    Case(
        "prompt and completion",
        "pairs.ndjson",
        lines({"prompt": "Q: ", "completion": "A"}),
        "Q: ",
        "A",
    ),
    Case(
        "preferences",
        "preferences.jsonl",
        lines({"prompt": "Q?", "chosen": "A", "rejected": "B"}),
        "Q?",
        "A (rather than B)",
    ),
    Case(
        "Alpaca",
        "alpaca.json",
        json.dumps(
            [{"instruction": "Add.", "input": "", "output": "A", "text": "Add. A"}]
        ).encode(),
        "user: Add.",
        "A",
    ),
    Case(
        "Dolly",
        "dolly.jsonl",
        lines({"instruction": "Q?", "context": "C.", "response": "A", "category": "qa"}),
        "user: Q?⏎⏎C.",
        "A",
    ),
    Case(
        "questions",
        "QUESTIONS.JSONL.GZ",
        gzip.compress(lines({"question": "Q?", "answer": "A"})),
        "user: Q?",
        "A",
    ),
    Case("text alone", "text.jsonl", b'\n{"text": "A story.", "url": "x"}\n\n', "", "A story."),
    Case(
        "lists by client",
        "by-client.json",
        json.dumps({c: [{"question": "Q?", "answer": "A"}] for c in ("north", "south")}).encode(),
        "user: Q?",
        "A",
    ),
    Case(
        "CSV of a German Excel",
        "umfrage.csv",
        "sep=;\r\nquestion;answer\r\nWie heißt er?;Müller\r\n".encode("cp1252"),
        "user: Wie heißt er?",
        "Müller",
    ),
    Case(
        "CSV of pandas, with row numbers and names of its own",
        "own.csv",
        b",Frage,Antwort\n0,Q?,A\n",
        "user: Q?",
        "A",
        {"question": "Frage", "answer": "Antwort"},
    ),
    Case("tabs", "tabs.tsv", b"question\tanswer\nQ?\tA, B; C\n", "user: Q?", "A, B; C"),
    Case("Excel workbook", "Book.xlsx", workbook, "user: What is 6 times 7?", "42"),
    Case("Parquet", "part.parquet", parquet, "user: Q?", "A"),
]


def write(case: Case, folder: Path) -> Path:
    """Write a case's file."""
    path = folder / case.name
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content)
    return path


def read(case: Case, folder: Path) -> tuple[str, str, str]:
    """Read a case's file: what was recognized, the first row's prompt and its answer."""
    path = write(case, folder)
    config = DataConfig(columns=case.columns)
    rows, examples = read_source(str(path), config, "train")
    origin = rows.origin
    recognized = ", ".join(filter(None, (origin.kind, origin.encoding, *origin.details)))
    names = find_format(rows.column_names, case.columns, "").names
    ignored = [name for name in rows.column_names if name not in names.values()]
    used = ", ".join(ours if ours == own else f"{own} = {ours}" for ours, own in names.items())
    recognized += f"; {used}"
    if ignored:
        recognized += f"; ignored: {', '.join(ignored)}"
    first = examples[0]
    prompt = first.prompt
    if prompt is None:
        prompt = ""
    elif not isinstance(prompt, str):
        prompt = " / ".join(f"{message['role']}: {message['content']}" for message in prompt)
    answer = first.completion
    if first.rejected is not None:
        answer += f" (rather than {first.rejected})"
    return recognized, prompt.replace("\n", "⏎"), answer


def table() -> str:
    """Return the table of docs/data.md."""
    rows = ["| what | file | read as | prompt | answer |", "|---|---|---|---|---|"]
    with TemporaryDirectory() as folder:
        for case in CASES:
            recognized, prompt, answer = read(case, Path(folder))
            cells = [case.title, f"`{case.name}`", recognized, prompt or "–", answer]
            rows.append("| " + " | ".join(cell.strip() for cell in cells) + " |")
    return "\n".join(rows)


def page(text: str) -> str:
    """Return the page with a new table."""
    start, end = map(re.escape, MARKS)
    new = f"{MARKS[0]}\n{table()}\n{MARKS[1]}"
    return re.sub(f"{start}.*?{end}", lambda _: new, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
