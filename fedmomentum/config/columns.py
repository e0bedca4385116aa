"""The columns of data sets that are read, by our names."""

from __future__ import annotations

COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "context",
    "response",
    "question",
    "answer",
    "system",
    "history",
    "text",
    "label",
    "text_a",
    "text_b",
)
"""The names of the columns that are read; `data.columns` maps them to a file's own."""
