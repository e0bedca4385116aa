"""Built-in tasks: short questions with verifiable answers, generated from a seed by reasoning-gym.

Nothing is downloaded. Each task is a reasoning-gym generator, configured to keep prompts and
answers short and the task within reach of a small model. A wordy question is replaced by a short
one built from the generator's metadata; an answer that is a Python list of strings becomes plain
"a, b, c". Tasks with rewritten answers are scored by exact match, all others by their generator's
own scorer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedmomentum.data.examples import Example
from fedmomentum.errors import DataError
from fedmomentum.utils.seeding import task_seed

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset


Entry = Mapping[str, Any]
"""An item that a generator returns: `question`, `answer` and `metadata`."""

DEFAULT_TASKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "calendar_arithmetic": {"tasks": ["weekday_offset"], "offset_upper_bound": 6},
        "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        "family_relationships": {"min_family_size": 3, "max_family_size": 4},
        "gcd": {"min_value": 2, "max_value": 60},
        "leg_counting": {"min_animals": 1, "max_animals": 2, "max_instances": 5},
        "letter_counting": {"min_words": 2, "max_words": 4},
        "needle_haystack": {"min_num_statements": 2, "max_num_statements": 3},
        "number_filtering": {
            "min_numbers": 3,
            "max_numbers": 5,
            "max_decimals": 0,
            "min_value": 0.0,
            "max_value": 99.0,
        },
        "number_sequence": {
            "min_terms": 4,
            "max_terms": 5,
            "min_value": 0,
            "max_value": 50,
            "max_complexity": 1,
        },
        "number_sorting": {
            "min_numbers": 3,
            "max_numbers": 4,
            "max_decimals": 0,
            "min_value": 0.0,
            "max_value": 99.0,
        },
        "simple_equations": {
            "min_terms": 2,
            "max_terms": 2,
            "max_value": 20,
            "operators": ["+", "-"],
            "operators_weights": [0.5, 0.5],
        },
        "spell_backward": {"min_word_len": 3, "max_word_len": 4},
        "word_sequence_reversal": {"min_words": 3, "max_words": 4},
        "word_sorting": {"min_words": 3, "max_words": 3, "max_word_length": 7},
    }
)
"""Task name -> settings of the reasoning-gym generator of that name."""


# ── questions and answers in our own words ────────────────────────────────────────────────────────


def _date_question(entry: Entry) -> str:
    question: str = entry["question"]
    return question.partition("? ")[0] + "?"


def _sum_question(entry: Entry) -> str:
    return f"{entry['metadata']['expression']} ="


def _gcd_question(entry: Entry) -> str:
    return f"Greatest common divisor of {_join(entry['metadata']['numbers'])}?"


def _legs_question(entry: Entry) -> str:
    animals = []
    for animal, count in entry["metadata"]["animals"].items():
        plural = "s" if count > 1 else ""
        animals.append(f"{count} {animal}{plural}")
    return f"How many legs in total: {' and '.join(animals)}?"


def _needle_question(entry: Entry) -> str:
    question: str = entry["question"]
    return question.removesuffix(" Reply only with a name.")


def _filter_question(entry: Entry) -> str:
    metadata = entry["metadata"]
    operation = metadata["operation"].replace("_", " numbers ").capitalize()
    numbers = _join(metadata["original_numbers"])
    return f"{operation} than {metadata['filter_value']}: {numbers}"


def _filter_answer(entry: Entry) -> str:
    return _join(entry["metadata"]["result"]) or "none"


def _sort_numbers_question(entry: Entry) -> str:
    metadata = entry["metadata"]
    numbers = _integers(metadata["original_numbers"])
    return f"Sort {metadata['direction']}: {_join(numbers)}"


def _sort_numbers_answer(entry: Entry) -> str:
    return _join(_integers(entry["metadata"]["sorted_numbers"]))


def _spell_question(entry: Entry) -> str:
    return f"Spell backward: {entry['metadata']['word']}"


def _reverse_question(entry: Entry) -> str:
    return f"Reverse the list: {_join(entry['metadata']['words'])}"


def _sort_words_question(entry: Entry) -> str:
    metadata = entry["metadata"]
    words = _join(metadata["transformed_words"])
    return f"Sort {metadata['direction']}, capitals first: {words}"


def _join(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _integers(numbers: Sequence[str]) -> list[int]:
    return [int(float(number)) for number in numbers]


QUESTIONS: Mapping[str, Callable[[Entry], str]] = MappingProxyType(
    {
        "calendar_arithmetic": _date_question,
        "chain_sum": _sum_question,
        "gcd": _gcd_question,
        "leg_counting": _legs_question,
        "needle_haystack": _needle_question,
        "number_filtering": _filter_question,
        "number_sorting": _sort_numbers_question,
        "spell_backward": _spell_question,
        "word_sequence_reversal": _reverse_question,
        "word_sorting": _sort_words_question,
    }
)
"""Tasks whose question we rewrite; the others keep the generator's."""

ANSWERS: Mapping[str, Callable[[Entry], str]] = MappingProxyType(
    {
        "number_filtering": _filter_answer,
        "number_sorting": _sort_numbers_answer,
    }
)
"""Tasks whose answer we reformat.

The generator's scorer cannot parse the new form, so it is scored by exact match.
"""


# ── examples and scores ───────────────────────────────────────────────────────────────────────────


def task_examples(
    names: Sequence[str], num_examples: int, seed: int, *, exclude: Collection[str] = frozenset()
) -> list[Example]:
    """Generate examples, the same number per task (the first tasks may get one more).

    Prompts are unique plain text, with the question and ``Answer:`` each on its own line.
    ``Example.category`` is the task's name.

    Args:
        names: Keys of `DEFAULT_TASKS`, without duplicates.
        num_examples: Total number of examples, at least one per task.
        seed: Determines the examples, at least 0; a task's examples do not depend on which other
            tasks are requested.
        exclude: Prompts to avoid; pass the training prompts when generating a test set (with a
            different seed).

    Returns:
        The examples, grouped by task.

    Raises:
        DataError: If a name is unknown or repeated, there are fewer examples than tasks, a task
            cannot generate enough distinct prompts, or reasoning-gym is not installed.
    """
    _check_names(names)
    if num_examples < len(names) or seed < 0:
        raise DataError(
            f"num_examples={num_examples} must be at least {len(names)}, one a task, and "
            f"seed={seed} at least 0"
        )
    per_task, num_extra = divmod(num_examples, len(names))
    examples = []
    for position, name in enumerate(names):
        count = per_task + (position < num_extra)
        examples += _generate(name, count, seed, set(exclude))
    return examples


def score_answer(example: Example, answer: str) -> float:
    """Score an answer in [0, 1] by the task's own scorer, or by exact match of the stripped text.

    Some scorers give partial credit, for example for the fraction of letters in the right place.

    Args:
        example: An example whose ``scoring`` was written by `task_examples`, or is empty.
        answer: The model's answer.

    Returns:
        The score; 1 for a correct answer.

    Raises:
        DataError: If ``scoring`` was not written by `task_examples`.
    """
    text = answer.strip()
    if not example.scoring:
        return float(text == example.completion.strip())
    try:
        entry = json.loads(example.scoring)
        generator = _generator(entry["metadata"]["source_dataset"], 0)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise DataError(
            f"scoring {example.scoring[:80]!r} does not name a known task; leave it empty for "
            "exact match"
        ) from None
    return float(generator.score_answer(text, entry))


def _check_names(names: Sequence[str]) -> None:
    """Reject unknown or repeated task names."""
    unknown = sorted(set(names) - set(DEFAULT_TASKS))
    problem = ""
    if unknown:
        problem = f"unknown: {', '.join(unknown)}"
    elif not names or len(set(names)) != len(names):
        problem = "each must be named once, and at least one"
    if problem:
        raise DataError(f"tasks {list(names)}: {problem}; known: {', '.join(DEFAULT_TASKS)}")


def _generate(name: str, count: int, seed: int, excluded: set[str]) -> list[Example]:
    """Generate examples of one task, adding their prompts to ``excluded``."""
    # reasoning-gym seeds item i with seed + i, so adjacent seeds share items; hashing seed and
    # task keeps the streams apart.
    generator = _generator(name, task_seed(seed, name))
    examples: list[Example] = []
    # Small tasks repeat themselves; after this many items the task is exhausted.
    for index in range(20 * count + 1000):
        entry = generator[index]
        question = QUESTIONS[name](entry) if name in QUESTIONS else entry["question"].strip()
        prompt = f"{question}\nAnswer:\n"
        # No duplicates, and no training prompts in a test set.
        if prompt in excluded:
            continue
        excluded.add(prompt)
        examples.append(_example(name, prompt, entry))
        if len(examples) == count:
            return examples
    raise DataError(
        f"task {name} made only {len(examples)} of {count} different prompts; ask for fewer "
        "examples or more tasks"
    )


def _example(name: str, prompt: str, entry: Entry) -> Example:
    """Convert a generator's item into an example."""
    if name in ANSWERS:
        return Example(prompt=prompt, completion=ANSWERS[name](entry), category=name)
    scored_fields = {"answer": entry["answer"], "metadata": entry["metadata"]}
    scoring = json.dumps(scored_fields, sort_keys=True)
    return Example(prompt=prompt, completion=entry["answer"], category=name, scoring=scoring)


@lru_cache(maxsize=64)
def _generator(name: str, seed: int) -> ProceduralDataset:
    """Return reasoning-gym's generator of a task."""
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            "the built-in tasks need reasoning-gym: pip install 'fedmomentum[demo]', or give your "
            "own data"
        ) from None
    return reasoning_gym.create_dataset(name, seed=seed, **DEFAULT_TASKS[name])
