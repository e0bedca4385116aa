"""The interface of evaluation tasks, the built-in tasks, and the resulting evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

from fedmomentum.data.builtin_tasks import score_answer
from fedmomentum.formats.scores import NO_EXAMPLES, LabelCounts, Score

if TYPE_CHECKING:
    from fedmomentum.data.examples import Example
    from fedmomentum.data.tokenized import TokenizedExample, TokenizedExamples
    from fedmomentum.objectives.objective import ExampleScore


EvalType = Literal["teacher-forced", "generated"]
"""What a task asks of a model: to predict given answers, or to generate its own."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a group of examples.

    Attributes:
        total: The score of all examples.
        by_category: The score of each category, sorted by name.
    """

    total: Score
    by_category: dict[str, Score]

    def __add__(self, other: Evaluation) -> Evaluation:
        """Return the combined scores of both groups."""
        by_category = {}
        for name in sorted(self.by_category.keys() | other.by_category.keys()):
            first = self.by_category.get(name, NO_EXAMPLES)
            second = other.by_category.get(name, NO_EXAMPLES)
            by_category[name] = first + second
        return Evaluation(self.total + other.total, by_category)


class Categorized(Protocol):
    """An example of a task."""

    @property
    def category(self) -> str:
        """The category by which scores are reported."""


ExampleT = TypeVar("ExampleT", bound=Categorized)
AnswerT = TypeVar("AnswerT", contravariant=True)


class EvaluationTask(Protocol[ExampleT, AnswerT]):
    """Held-out examples, and how a model's answers to them are scored."""

    @property
    def eval_type(self) -> EvalType:
        """What the task asks of a model."""

    @property
    def num_examples(self) -> int:
        """Number of examples."""

    def get_example(self, index: int) -> ExampleT:
        """Return an example; indices start at 0."""

    def evaluate(self, example: ExampleT, answer: AnswerT) -> Score:
        """Score an answer to an example."""


def evaluate_task(
    task: EvaluationTask[ExampleT, AnswerT], answers: Iterable[tuple[int, AnswerT]]
) -> Evaluation:
    """Score a model's answers to a task.

    Args:
        task: The task.
        answers: Pairs of an example's index and the model's answer, in the order in which scores
            are summed.

    Returns:
        The scores in total and by category.
    """
    # Sum by category first: the total is the sum of the categories in sorted order. A classifier's
    # counts by label belong to the total, since mistakes involve other categories.
    by_category: dict[str, Score] = {}
    for index, answer in answers:
        example = task.get_example(index)
        score = by_category.get(example.category, NO_EXAMPLES)
        by_category[example.category] = score + task.evaluate(example, answer)
    by_category = dict(sorted(by_category.items()))
    total = sum(by_category.values(), NO_EXAMPLES)
    for name, score in by_category.items():
        by_category[name] = score.without_labels()
    return Evaluation(total, by_category)


@dataclass(frozen=True)
class TeacherForcedTask:
    """Predict each token of the given answer from those before it.

    An example counts as exact if the most likely token is correct at every position of the
    completion, including its end token; if all assistant turns are learned, in all of them. A
    truncated completion contributes to the loss but never counts as exact.

    A pair of answers counts if the chosen one has the larger reward, truncated or not.

    Attributes:
        examples: The tokenized examples.
    """

    examples: TokenizedExamples
    eval_type: ClassVar[EvalType] = "teacher-forced"

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def get_example(self, index: int) -> TokenizedExample:
        """Return an example; indices start at 0."""
        return self.examples.example(index)

    def evaluate(self, example: TokenizedExample, answer: ExampleScore) -> Score:
        """Score the predictions for an example's tokens."""
        # Answers of a pair may be truncated; the end of a truncated completion is unknown.
        is_pair = answer.margin is not None
        is_exact = answer.is_exact and (is_pair or not example.is_truncated)
        by_label = _label_counts(answer.label, answer.predicted) if answer.label else {}
        return Score(
            answer.nll,
            answer.num_targets,
            1,
            int(is_exact),
            margin=answer.margin,
            by_label=by_label,
        )


def _label_counts(label: str, predicted: str) -> dict[str, LabelCounts]:
    """Return the counts of one classified example."""
    if label == predicted:
        return {label: LabelCounts(1, 1, 1)}
    return {label: LabelCounts(1, 0, 0), predicted: LabelCounts(0, 1, 0)}


@dataclass(frozen=True)
class GenerationTask:
    """Generate an answer to each prompt.

    An example counts as exact if its task's scorer gives the answer the full score; see
    `score_answer`. There is no loss.

    Attributes:
        examples: The examples.
    """

    examples: Sequence[Example]
    eval_type: ClassVar[EvalType] = "generated"

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def get_example(self, index: int) -> Example:
        """Return an example; indices start at 0."""
        return self.examples[index]

    def evaluate(self, example: Example, answer: str) -> Score:
        """Score the text of an answer."""
        is_exact = score_answer(example, answer) >= 1
        return Score(0.0, 0, 1, int(is_exact))
