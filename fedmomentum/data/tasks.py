"""Built-in tasks: short questions with verifiable answers, made by reasoning-gym from a seed, nothing downloaded.

Each task is one of reasoning-gym's generators with settings that keep prompt and answer short and the work
within reach of a small model. Where the stock question is wordy a short one is built from the generator's own
metadata; where the stock answer is a Python list of strings it becomes plain "a, b, c". A task whose answer is
rewritten so is scored by exact match, every other by its generator's own scorer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmomentum.data.examples import Example
from fedmomentum.errors import DataError

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

Entry = Mapping[str, Any]

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
        "number_sequence": {"min_terms": 4, "max_terms": 5, "min_value": 0, "max_value": 50, "max_complexity": 1},
        "number_sorting": {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},
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
"""Name of the task -> settings of the reasoning-gym generator of that name."""

# Questions in our own words, from the generator's metadata. Tasks not listed keep their stock question.
_QUESTIONS: dict[str, Callable[[Entry], str]] = {
    "calendar_arithmetic": lambda entry: entry["question"].partition("? ")[0] + "?",
    "chain_sum": lambda entry: f"{entry['metadata']['expression']} =",
    "gcd": lambda entry: f"Greatest common divisor of {_listed(entry['metadata']['numbers'])}?",
    "leg_counting": lambda entry: f"How many legs in total: {_animals(entry['metadata']['animals'])}?",
    "needle_haystack": lambda entry: entry["question"].removesuffix(" Reply only with a name."),
    "number_filtering": lambda entry: (
        f"{entry['metadata']['operation'].replace('_', ' numbers ').capitalize()} than "
        f"{entry['metadata']['filter_value']}: {_listed(entry['metadata']['original_numbers'])}"
    ),
    "number_sorting": lambda entry: (
        f"Sort {entry['metadata']['direction']}: {_listed(_whole(entry['metadata']['original_numbers']))}"
    ),
    "spell_backward": lambda entry: f"Spell backward: {entry['metadata']['word']}",
    "word_sequence_reversal": lambda entry: f"Reverse the list: {_listed(entry['metadata']['words'])}",
    "word_sorting": lambda entry: (
        f"Sort {entry['metadata']['direction']}, capitals first: {_listed(entry['metadata']['transformed_words'])}"
    ),
}

# Answers in another form than the generator's; its scorer cannot read them, so they are matched exactly.
_ANSWERS: dict[str, Callable[[Entry], str]] = {
    "number_filtering": lambda entry: _listed(entry["metadata"]["result"]) or "none",
    "number_sorting": lambda entry: _listed(_whole(entry["metadata"]["sorted_numbers"])),
}


def task_examples(
    names: Sequence[str], num_examples: int, seed: int, *, exclude: Collection[str] = frozenset()
) -> list[Example]:
    """Make examples, an equal share of each task (one more for the first where it does not divide).

    Prompts are plain text, the question and ``Answer:`` each on its own line, and no prompt comes twice.
    ``Example.category`` is the task's name.

    Args:
        names: Keys of `DEFAULT_TASKS`, each once.
        num_examples: How many in all, at least one a task.
        seed: Decides them, at least 0; a task's examples do not depend on which other tasks are asked for.
        exclude: Prompts that must not come; give the training prompts when making a test set, under another seed.

    Returns:
        The examples, task after task.

    Raises:
        DataError: A name is unknown or double, there are too few examples for the tasks, a task cannot make so
            many different prompts, or reasoning-gym is not installed.
    """
    unknown = sorted(set(names) - set(DEFAULT_TASKS))
    if unknown or not names or len(set(names)) != len(names):
        trouble = f"unknown: {', '.join(unknown)}" if unknown else "each must be named once, and at least one"
        raise DataError(f"tasks {list(names)}: {trouble}; known: {', '.join(DEFAULT_TASKS)}")
    if num_examples < len(names) or seed < 0:
        raise DataError(
            f"num_examples={num_examples} must be at least {len(names)}, one a task, and seed={seed} at least 0"
        )
    share, extra = divmod(num_examples, len(names))
    return [
        example
        for position, name in enumerate(names)
        for example in _draw(name, share + (position < extra), seed, set(exclude))
    ]


def score(example: Example, answer_text: str) -> float:
    """Score an answer in [0, 1]: by the task's own scorer, else 1 for the exact text (stripped) and 0 for others.

    Some of the generators' scorers give partial credit, for example for the share of letters in place.

    Args:
        example: With ``scoring`` as `task_examples` wrote it, or empty.
        answer_text: What the model answered.

    Raises:
        DataError: ``scoring`` is not ours.
    """
    answer = answer_text.strip()
    if not example.scoring:
        return float(answer == example.completion.strip())
    try:
        entry = json.loads(example.scoring)
        generator = _generator(entry["metadata"]["source_dataset"], 0)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise DataError(
            f"scoring {example.scoring[:80]!r} does not name a known task; leave it empty for exact match"
        ) from None
    return float(generator.score_answer(answer, entry))


def _draw(name: str, count: int, seed: int, seen: set[str]) -> list[Example]:
    # reasoning-gym seeds item i with seed + i, so neighbouring seeds share items. A hash of seed and task sets
    # streams apart; 31 bits, because some generators hand the sum to NumPy's 32-bit seeding.
    start = int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0] >> 1)
    generator = _generator(name, start)
    examples: list[Example] = []
    # Small tasks repeat themselves; past this many draws the task has run dry.
    for index in range(20 * count + 1000):
        entry = generator[index]
        prompt = f"{_QUESTIONS[name](entry) if name in _QUESTIONS else entry['question'].strip()}\nAnswer:\n"
        if prompt in seen:
            continue
        seen.add(prompt)
        if name in _ANSWERS:
            examples.append(Example(prompt=prompt, completion=_ANSWERS[name](entry), category=name))
        else:
            scoring = json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]}, sort_keys=True)
            examples.append(Example(prompt=prompt, completion=entry["answer"], category=name, scoring=scoring))
        if len(examples) == count:
            return examples
    raise DataError(
        f"task {name} made only {len(examples)} of {count} different prompts; ask for fewer examples or more tasks"
    )


@lru_cache(maxsize=64)
def _generator(name: str, seed: int) -> ProceduralDataset:
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            "the built-in tasks need reasoning-gym: pip install 'fedmomentum[demo]', or give your own data"
        ) from None
    return reasoning_gym.create_dataset(name, seed=seed, **DEFAULT_TASKS[name])


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _whole(numbers: Sequence[str]) -> list[int]:
    return [int(float(number)) for number in numbers]


def _animals(animals: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {animal}{'s' if count > 1 else ''}" for animal, count in animals.items())
