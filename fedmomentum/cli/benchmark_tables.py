"""Tables and notes about standard benchmark scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Column, Table
from rich.text import Text

from fedmomentum.cli.columns import name_column, number_columns
from fedmomentum.formats.benchmark_file import MetricScore, TaskResult
from fedmomentum.results.benchmarks import benchmark_lines
from fedmomentum.results.formatting import MISSING

CAPTION = "right in % [95 % interval]; the difference in points, on the same examples, with its own"


def benchmark_tables(results: Sequence[TaskResult]) -> Iterator[Table]:
    """Yield one table per task: base and federated models side by side, one row per metric."""
    for result in results:
        num_examples = result.models[0].scores[0].num_examples
        table = Table(
            name_column("metric", min_width=_longest_word(result)),
            Column("round", justify="right", no_wrap=True),
            *number_columns("base", "federated", "difference"),
            title=Text(f"{result.task}, {num_examples} examples"),
            title_justify="left",
        )
        # A plain model has nothing to compare with.
        if result.base is not None and not result.federated:
            for score in result.base.scores:
                table.add_row(Text(score.name), MISSING, _percent(score), MISSING, MISSING)
        for line in benchmark_lines([result]):
            table.add_row(
                Text(line.score.name),
                MISSING if line.model.round is None else str(line.model.round),
                MISSING if line.base is None else _percent(line.base),
                _percent(line.score),
                MISSING if line.difference is None else _points(line.difference),
            )
        yield table


def _longest_word(result: TaskResult) -> int:
    """Return the width in which no word of a metric's name is broken."""
    words = ["metric"]
    for model in result.models:
        for score in model.scores:
            words += score.name.split()
    return max(map(len, words))


def _percent(score: MetricScore) -> str:
    """Format a score with its interval, such as `38.6 [34.2, 43.1]`."""
    low, high = score.interval
    return f"{100 * score.fraction:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _points(difference: tuple[float, float, float]) -> str:
    """Format a difference in points with its interval, such as `+1.3 [-0.2, +2.8]`."""
    value, low, high = difference
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def benchmark_notes(results: Sequence[TaskResult]) -> list[str]:
    """Return notes about truncated prompts and answers."""
    notes = []
    for result in results:
        for model in result.models:
            who = "the base model" if model.model == "base" else "the federated model"
            if model.round is not None:
                who += f" of round {model.round}"
            num_examples = model.scores[0].num_examples
            if model.num_truncated:
                notes.append(
                    f"{result.task}, {who}: {model.num_truncated} of {num_examples} prompts were "
                    "cut from the left; the score may be wrong"
                )
            if model.num_unfinished:
                notes.append(
                    f"{result.task}, {who}: {model.num_unfinished} of {num_examples} answers were "
                    "cut at the longest length"
                )
    return notes
