"""Tables in the terminal: no number is cut off, however narrow it is."""

import re

import pytest
from rich.table import Column, Table

from fedmomentum.cli.benchmark_tables import benchmark_tables
from fedmomentum.cli.columns import name_column, number_columns
from fedmomentum.cli.options import OUT, print_uncut
from fedmomentum.formats.benchmark_file import (
    MetricScore,
    ModelScores,
    TaskResult,
)
from tests.formats.test_benchmark_file import SETTINGS

NAME = "fedmomentum:split=procrustes;training.optimizer-state=shared"
NUMBERS = ("100.0 [56.6, 100.0]", "−20.0 [−52.4, +23.9]", "4.928 -> 4.107")
WIDTHS = (20, 60, 80, 100, 200)


def cells(text):
    """The cells of each printed line."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_are_whole_and_names_complete_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setattr(OUT, "_width", width)
    columns = [Column("round"), *number_columns("base", "tuned", "loss")]
    table = Table(name_column(), *columns)
    table.add_row(NAME, "12", *NUMBERS)
    print_uncut(table)
    rows = [row for row in cells(capsys.readouterr().out) if row]
    assert rows[0][1:] == ["12", *NUMBERS]
    assert "".join(row[0] for row in rows) == NAME
    # A name is broken only where the terminal is too narrow for it.
    assert (len(rows) == 1) == (width == 200)


def task_result():
    """A task with two ways of extracting the answer, as gsm8k has."""
    scores = [
        MetricScore(metric="exact_match", extraction=name, correct="10" * 20)
        for name in ("strict-match", "flexible-extract")
    ]
    models = [
        ModelScores(
            model=model,
            round=server_round,
            num_truncated=0,
            num_unfinished=0,
            seconds=1.0,
            scores=scores,
        )
        for model, server_round in (("base", None), ("federated", 3))
    ]
    return TaskResult(task="gsm8k", settings=SETTINGS, models=models)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_benchmarks_metrics_are_broken_between_words_only(width, monkeypatch, capsys):
    monkeypatch.setattr(OUT, "_width", width)
    (table,) = benchmark_tables([task_result()])
    print_uncut(table)
    text = capsys.readouterr().out
    rows = [row for row in cells(text) if row]
    assert " ".join(row[0] for row in rows) == (
        "exact_match, strict-match exact_match, flexible-extract"
    )
    numbers = [row[1:] for row in rows if row[1]]
    assert numbers == 2 * [["3", *2 * ["50.0 [35.2, 64.8]"], "+0.0 [-4.7, +4.7]"]]
    assert re.search("metric +┃ round +┃ base +┃ federated +┃ difference", text)
