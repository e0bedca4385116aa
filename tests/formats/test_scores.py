"""Scores of classifiers add up: accuracy and macro F1 of groups are those of their examples."""

import math
import random

import msgspec
import pytest

from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.errors import DataError
from fedmomentum.evaluation.tasks import TeacherForcedTask, evaluate_task
from fedmomentum.formats.metrics_file import parse_record_line
from fedmomentum.formats.round_record import EvaluationRecord, RoundRecord
from fedmomentum.formats.scores import LabelCounts, Score
from fedmomentum.objectives.objective import ExampleScore

NAMES = ("a", "b", "c", "d")


def evaluated(pairs):
    """The evaluation of examples with these (label, predicted) pairs."""
    rows = len(pairs)
    examples = TokenizedExamples(
        ((1, 0),) * rows, (1,) * rows, tuple(label for label, _ in pairs), (False,) * rows, 0
    )
    answers = []
    for row, (label, predicted) in enumerate(pairs):
        answers.append((row, ExampleScore(0.5, 1, label == predicted, None, label, predicted)))
    return evaluate_task(TeacherForcedTask(examples), answers)


def macro_f1(pairs):
    """By its definition: precision and recall of every label that occurs on either side."""
    values = []
    for name in sorted({name for pair in pairs for name in pair}):
        right = sum(pair == (name, name) for pair in pairs)
        predicted = sum(guess == name for _, guess in pairs)
        actual = sum(label == name for label, _ in pairs)
        precision = right / predicted if predicted else 0.0
        recall = right / actual if actual else 0.0
        values.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_by_its_definition_also_of_groups_together(seed):
    generator = random.Random(seed)
    # The last label is never predicted, or never right.
    groups = []
    for size in (1, 7, 40):
        groups.append([(generator.choice(NAMES), generator.choice(NAMES[:3])) for _ in range(size)])
    together = [pair for group in groups for pair in group]
    total = sum((evaluated(group).total for group in groups[1:]), evaluated(groups[0]).total)
    assert total == evaluated(together).total
    assert total.macro_f1 == pytest.approx(macro_f1(together), abs=1e-12)
    for group in groups:
        assert evaluated(group).total.macro_f1 == pytest.approx(macro_f1(group), abs=1e-12)
    right = sum(label == guess for label, guess in together)
    assert total.exact_match == right / len(together) and total.measure == "accuracy"
    assert total.loss == 0.5


def test_a_category_has_no_counts_of_its_own_and_a_language_model_none():
    evaluation = evaluated([("a", "b"), ("b", "b")])
    assert evaluation.by_category["a"] == Score(0.5, 1, 1, 0)
    assert evaluation.by_category["b"] == Score(0.5, 1, 1, 1)
    plain = Score(1.0, 3, 2, 1)
    assert plain.macro_f1 is None and plain.measure == "exact match"
    assert "macro_f1" not in plain.to_json() and "by_label" not in plain.to_json()


@pytest.mark.parametrize(
    ("by_label", "message"),
    [
        ({"a": [2, 2, 2]}, "do not add up"),
        ({"a": [1, 2, 1]}, "do not add up"),
        ({"a": [1, 1, 0]}, "do not add up"),
        ({"a": [1, 0, 1]}, "1 right predictions of 0 for 1 examples"),
    ],
)
def test_impossible_counts_are_refused(by_label, message):
    counts = {}
    for label, values in by_label.items():
        counts[label] = dict(zip(LabelCounts.__struct_fields__, values, strict=True))
    row = {"nll": 0.0, "num_tokens": 1, "num_examples": 1, "num_exact": 1, "by_label": counts}
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(row, Score)


def test_a_row_of_metrics_is_read_as_it_was_written():
    total = evaluated([("a", "b"), ("b", "b"), ("c", "a")]).total
    record = RoundRecord(round=1, evaluation=EvaluationRecord(total=total, by_client={"x": total}))
    row = record.to_json()
    written = row["evaluation"]["total"]
    assert written["macro_f1"] == pytest.approx(2 / 9, abs=1e-12)
    assert written["by_label"]["b"] == {
        "num_examples": 1,
        "num_predicted": 2,
        "num_exact": 1,
        "f1": pytest.approx(2 / 3),
    }
    read = parse_record_line(msgspec.json.encode(row), "a row", DataError)
    assert read.evaluation == record.evaluation
    assert not math.isnan(read.evaluation.total.macro_f1)
