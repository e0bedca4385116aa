import json
import subprocess
import sys

import pytest

from fedmomentum.data import DEFAULT_TASKS, Example, score_answer, task_examples
from fedmomentum.errors import DataError

pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("name", DEFAULT_TASKS)
def test_task_is_short_and_its_own_answer_is_right(name):
    examples = task_examples([name], 60, seed=0)
    assert len({example.prompt for example in examples}) == 60
    assert {example.category for example in examples} == {name}
    for example in examples:
        assert example.prompt.endswith("\nAnswer:\n")
        assert len(example.prompt) + len(example.completion) < 260
        assert score_answer(example, example.completion) == 1.0
        assert score_answer(example, f" {example.completion}\n") == 1.0
        assert score_answer(example, "no such answer") < 0.5
        assert score_answer(example, "") == 0.0


def test_short_questions_keep_what_the_answer_needs():
    """Solve the rewritten questions from their text alone."""

    def solve(name, text):
        head, _, tail = text.partition(": ")
        items = tail.split(", ")
        if name == "chain_sum":
            left, sign, right = text.removesuffix(" =").split(" ")
            return str(int(left) + int(right) if sign == "+" else int(left) - int(right))
        if name == "number_sorting":
            return ", ".join(map(str, sorted(map(int, items), reverse=head.endswith("descending"))))
        if name == "word_sorting":
            return ", ".join(sorted(items, reverse="descending" in head))
        if name == "word_sequence_reversal":
            return ", ".join(reversed(items))
        if name == "spell_backward":
            return tail[::-1]
        verb, _, side, _, limit = head.split(" ")
        keeps = [(int(item) > int(limit)) == (side == "larger") for item in items]
        kept = [item for item, keep in zip(items, keeps, strict=True) if keep == (verb == "Keep")]
        return ", ".join(kept) or "none"

    for name in (
        "chain_sum",
        "number_filtering",
        "number_sorting",
        "spell_backward",
        "word_sequence_reversal",
        "word_sorting",
    ):
        for example in task_examples([name], 100, seed=3):
            question = example.prompt.removesuffix("\nAnswer:\n")
            if (
                name == "number_filtering"
                and question.partition(":")[0].split(" ")[-1] in question.partition(": ")[2]
            ):
                continue  # a number equal to the limit belongs to neither side
            assert solve(name, question) == example.completion, question


def test_equal_shares_and_independence_of_the_other_tasks():
    names = ["gcd", "chain_sum", "leg_counting"]
    examples = task_examples(names, 11, seed=5)
    assert [example.category for example in examples] == ["gcd"] * 4 + ["chain_sum"] * 4 + [
        "leg_counting"
    ] * 3
    assert task_examples(["chain_sum"], 4, seed=5) == examples[4:8]


def test_seeds_next_to_each_other_share_no_stream():
    """The generators seed item i with seed + i; plain seeds 0 and 1 would share all but one item."""
    first = {example.prompt for example in task_examples(["number_sorting"], 100, seed=0)}
    second = {example.prompt for example in task_examples(["number_sorting"], 100, seed=1)}
    assert len(first & second) < 5


def test_excluded_prompts_are_not_generated():
    first = task_examples(["gcd"], 300, seed=0)
    prompts = {example.prompt for example in first}
    assert prompts.isdisjoint(
        example.prompt for example in task_examples(["gcd"], 300, seed=0, exclude=prompts)
    )


def test_result_does_not_depend_on_the_hash_seed(monkeypatch):
    code = "from fedmomentum.data import *; print(task_examples(list(DEFAULT_TASKS), 56, seed=0))"
    outputs = set()
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        outputs.add(
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout
        )
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("names", "count", "seed", "message"),
    [
        (["gcd", "chess"], 10, 0, "unknown: chess; known: calendar_arithmetic, "),
        ([], 10, 0, "at least one"),
        (["gcd", "gcd"], 10, 0, "named once"),
        (["gcd", "chain_sum"], 1, 0, "num_examples=1 must be at least 2"),
        (["gcd"], 1, -1, "seed=-1"),
        (["gcd"], 4000, 0, "task gcd made only [0-9]+ of 4000 different prompts"),
    ],
)
def test_impossible_requests_are_refused(names, count, seed, message):
    with pytest.raises(DataError, match=message):
        task_examples(names, count, seed)


def test_score_without_a_scorer_is_an_exact_match():
    example = Example("capital of France?", " Paris")
    assert score_answer(example, "Paris\n") == 1.0
    assert score_answer(example, "paris") == 0.0
    assert score_answer(example, "It is Paris") == 0.0


@pytest.mark.parametrize(
    "scoring", ["{", "[]", "3", "{}", json.dumps({"metadata": {"source_dataset": "chess"}})]
)
def test_foreign_scoring_is_refused(scoring):
    with pytest.raises(DataError, match="scoring"):
        score_answer(Example("a", "b", scoring=scoring), "b")
