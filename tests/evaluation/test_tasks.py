"""Both kinds of task follow one contract, and score an answer by their own rule."""

import pytest

from fedmomentum.data.examples import Example
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.evaluation.tasks import GenerationTask, TeacherForcedTask, evaluate_task
from fedmomentum.formats.scores import NO_EXAMPLES, Score
from fedmomentum.objectives.objective import ExampleScore

TOKENS = TokenizedExamples(((1, 2), (3, 4, 5)), (1, 1), ("b", "a"), (False, True), 0)
TEXTS = [Example("1 + 1 =", "2", category="b"), Example("2 + 2 =", "4", category="a")]


@pytest.mark.parametrize("task", [TeacherForcedTask(TOKENS), GenerationTask(TEXTS)])
def test_both_tasks_keep_the_contract(task):
    assert task.num_examples == 2 and task.eval_type in ("teacher-forced", "generated")
    assert [task.get_example(index).category for index in range(2)] == ["b", "a"]
    assert evaluate_task(task, []).total == NO_EXAMPLES


def test_a_truncated_completion_is_never_exact():
    task = TeacherForcedTask(TOKENS)
    answer = ExampleScore(nll=0.5, num_targets=2, is_exact=True)
    evaluation = evaluate_task(task, [(0, answer), (1, answer)])
    assert evaluation.total == Score(1.0, 4, 2, 1)
    assert list(evaluation.by_category) == ["a", "b"]
    assert evaluation.by_category["a"] == Score(0.5, 2, 1, 0)


def test_an_answer_is_scored_by_its_text():
    task = GenerationTask(TEXTS)
    evaluation = evaluate_task(task, enumerate([" 2 ", "5"]))
    assert evaluation.total == Score(0.0, 0, 2, 1)
    assert evaluation.by_category["b"].num_exact == 1
