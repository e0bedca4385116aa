"""Multiple choice by likelihood: a run's model answers with the choice that it finds most likely."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import task_files
from task_files import Row

from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import tokenize
from fedmomentum.evaluation.teacher_forcing import evaluation_mode, predict_examples
from fedmomentum.objectives.objective import CAUSAL_LM
from fedmomentum.run.inference import LoadSettings, ModelPair
from fedmomentum.run.saved_model import open_result

Counts = dict[str, tuple[int, int]]
"""By category: questions answered correctly, and questions."""


def with_choices(rows: Sequence[Row]) -> list[Row]:
    """Return the questions with every completion that they allow, instead of the right one."""
    return [
        Row(row.prompt, choice, row.category) for row in rows for choice in task_files.choices(row)
    ]


def count_correct(run: Path, rows: Sequence[Row], *, max_length: int, batch_size: int) -> Counts:
    """Answer multiple-choice questions with the model of a run's last round.

    A choice's likelihood is that of all its tokens and of the end; the choices of the sets are
    equally long, so it makes no difference whether it is taken per token.

    Args:
        run: The run's directory.
        rows: The questions; see `task_files.choices`.
        max_length: Longest example in tokens; none may be cut.
        batch_size: Examples in a forward pass.
    """
    pair = ModelPair(open_result(run), LoadSettings())
    examples = [
        Example(prompt=row.prompt, completion=row.completion, category=row.category)
        for row in with_choices(rows)
    ]
    tokens = tokenize(
        examples,
        pair.tokenizer,
        max_length=max_length,
        max_truncated_fraction=0.0,
        owner="the questions",
    )
    assert len(tokens) == len(examples)
    with pair.tuned(), evaluation_mode(pair.model):
        scores = dict(predict_examples(pair.model, tokens, CAUSAL_LM, 0, batch_size))
    counts: Counts = {}
    place = 0
    for row in rows:
        completions = task_files.choices(row)
        nlls = [scores[place + k].nll for k in range(len(completions))]
        place += len(completions)
        answer = completions[nlls.index(min(nlls))]
        correct, total = counts.get(row.category, (0, 0))
        counts[row.category] = (correct + (answer == row.completion), total + 1)
    return counts


def read_counts(file: Path) -> dict[tuple[str, int], Counts]:
    """Return what `write_counts` wrote, by method and seed; nothing if there is no file."""
    found: dict[tuple[str, int], Counts] = {}
    if not file.is_file():
        return found
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened):
            counts = found.setdefault((row["method"], int(row["seed"])), {})
            counts[row["category"]] = (int(row["correct"]), int(row["questions"]))
    return found


def write_counts(file: Path, counts: Mapping[tuple[str, int], Counts]) -> None:
    """Write a line for each method, seed and category."""
    with file.open("w", newline="") as opened:
        table = csv.writer(opened, lineterminator="\n")
        table.writerow(["method", "seed", "category", "correct", "questions"])
        for (method, seed), by_category in counts.items():
            for category, (correct, total) in sorted(by_category.items()):
                table.writerow([method, seed, category, correct, total])
