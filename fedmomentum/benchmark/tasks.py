"""Makes lm-evaluation-harness tasks from validated task files.

A task file's templates are rendered in Jinja's sandbox and data is passed as rows, so none of
lm-eval's code that imports, executes or downloads is reached.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import jinja2
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.task import ConfigurableTask

from fedmomentum.benchmark.programs import pass_at_1
from fedmomentum.benchmark.task_files import TaskData, check_program_columns
from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

FEWSHOT_SEED = 1234
"""The same as lm-eval's, so that both choose the same few-shot examples."""
_TEMPLATES = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)

_INDEX = re.compile("[0-9]{1,9}")

Render = Callable[[Mapping[str, Any]], Any]


def make_task(data: TaskData, num_fewshot: int | None = None) -> ConfigurableTask:
    """Return a fresh task; repeated calls give the same prompts in the same order.

    Args:
        data: The task file and its rows.
        num_fewshot: The number of few-shot examples; None for the task file's.

    Raises:
        DataError: If a row gives no prompt, choices or answer, or there are too few rows to choose
            few-shot examples from.
    """
    file = data.file
    shots = file.num_fewshot if num_fewshot is None else num_fewshot
    renders = _renders(data)
    _check_rows(data, renders)
    _check_shots(data, shots)
    # Undeclared fields keep lm-eval's defaults.
    table: dict[str, Any] = msgspec.to_builtins(file)
    config = {
        "task": file.task,
        "custom_dataset": lambda **_: _dataset(data),
        "output_type": file.output_type,
        "num_fewshot": shots,
        "metadata": {},
        **renders,
    }
    for name in (
        "test_split",
        "training_split",
        "description",
        "target_delimiter",
        "fewshot_delimiter",
        "unsafe_code",
    ):
        config[name] = table[name]
    # Set the few-shot examples, and how answers are generated, extracted and compared.
    config["fewshot_split"] = file.fewshot_split or file.training_split
    config["fewshot_config"] = table["fewshot_config"]
    if file.generation_kwargs is not None:
        config["generation_kwargs"] = table["generation_kwargs"]
    config["metric_list"] = [_metric(metric) for metric in table["metric_list"]]
    if file.filter_list:
        config["filter_list"] = [
            {**one, "filter": [_without_none(step) for step in one["filter"]]}
            for one in table["filter_list"]
        ]
    if file.runs_code:
        config["process_results"] = pass_at_1
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


def _metric(table: dict[str, Any]) -> dict[str, Any]:
    """Return a metric in lm-eval's format; only `exact_match` has settings."""
    if table["metric"] != "exact_match":
        return {key: table[key] for key in ("metric", "aggregation", "higher_is_better")}
    return {**table, "regexes_to_ignore": table["regexes_to_ignore"] or None}


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _dataset(data: TaskData) -> datasets.DatasetDict:
    try:
        splits = {split: datasets.Dataset.from_list(rows) for split, rows in data.rows.items()}
    except (ValueError, TypeError, OverflowError) as problem:
        raise DataError(
            f"{data.path}: a column holds values of different types: {printable(str(problem), 200)}"
        ) from problem
    return datasets.DatasetDict(splits)


# ── templates ─────────────────────────────────────────────────────────────────────────────────────


def _renders(data: TaskData) -> dict[str, Any]:
    """Return the task's templates as functions of a row, with lm-eval's rules for each."""
    file = data.file
    columns = set(data.rows[file.test_split][0])
    text = _render(data, "doc_to_text", file.doc_to_text, columns)
    renders: dict[str, Any] = {"doc_to_text": text}
    if isinstance(file.doc_to_target, int):
        renders["doc_to_target"] = file.doc_to_target
    else:
        target = _render(data, "doc_to_target", file.doc_to_target, columns)
        # Digits that a template gives are an index; those in a named column are a choice's text.
        is_index = file.doc_to_choice is not None and file.doc_to_target not in columns
        renders["doc_to_target"] = lambda row: _as_index(target(row)) if is_index else target(row)
    if isinstance(file.doc_to_choice, str):
        choice = _render(data, "doc_to_choice", file.doc_to_choice, columns)
        renders["doc_to_choice"] = lambda row: _as_list(choice(row))
    elif file.doc_to_choice is not None:
        renders["doc_to_choice"] = file.doc_to_choice
    return renders


def _render(data: TaskData, field: str, template: str, columns: set[str]) -> Render:
    """Return one template as a function; a column's name stands for the column."""
    if template in columns:
        return lambda row: _cell(data, field, template, row)
    try:
        compiled = _TEMPLATES.from_string(template)
    except jinja2.TemplateError as problem:
        raise DataError(f"{data.path}: {field}: {problem}") from problem

    def render(row: Mapping[str, Any]) -> str:
        try:
            return compiled.render(**row)
        # a template can fail in any way, such as division by zero
        except Exception as problem:
            raise DataError(
                f"{data.path}: {field}: {printable(str(problem), 200)}; the columns are "
                f"{', '.join(sorted(columns))}"
            ) from problem

    return render


def _cell(data: TaskData, field: str, column: str, row: Mapping[str, Any]) -> Any:
    """Return a row's value in a column of the test split, which other splits may lack."""
    if column not in row:
        raise DataError(
            f"{data.path}: {field}: {printable(column, 80)!r} is a column of "
            f"{data.file.test_split}, and not of all splits; another one has "
            f"{printable(', '.join(sorted(row)), 200)}"
        )
    return row[column]


def _as_index(value: Any) -> Any:
    """Convert a template's digits to the index of a choice, as lm-eval does."""
    if isinstance(value, str) and _INDEX.fullmatch(value):
        return int(value)
    return value


def _as_list(value: Any) -> Any:
    """Convert the text of a list to a list, as lm-eval does."""
    if isinstance(value, str):
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return value


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────


def _check_rows(data: TaskData, renders: Mapping[str, Any]) -> None:
    """Reject rows that lm-eval would score as wrong regardless of the model's answer."""
    if data.file.runs_code:
        check_program_columns(data)
    choices: Any = renders.get("doc_to_choice")
    for split, rows in data.rows.items():
        for number, row in enumerate(rows, start=1):
            where = f"{data.path}: row {number} of {split}"
            prompt = renders["doc_to_text"](row)
            if not isinstance(prompt, str) or not prompt.strip():
                raise DataError(f"{where}: doc_to_text gives no text")
            target = renders["doc_to_target"]
            answer = target(row) if callable(target) else target
            if choices is None:
                if not isinstance(answer, str) or not answer:
                    raise DataError(f"{where}: doc_to_target gives no text")
            else:
                given = choices(row) if callable(choices) else choices
                _check_choices(given, answer, where)


def _check_choices(choices: Any, answer: Any, where: str) -> None:
    """Reject invalid choices, and an answer that is not among them."""
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise DataError(f"{where}: doc_to_choice gives no list of two choices or more")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(f"{where}: a choice is no text, or empty")
    is_index = isinstance(answer, int) and not isinstance(answer, bool)
    right = choices[answer] if is_index and 0 <= answer < len(choices) else answer
    if right not in choices:
        raise DataError(
            f"{where}: the answer {printable(repr(answer), 80)} is none of its {len(choices)} "
            "choices"
        )
    # Of equal choices, lm-eval takes the first, which is wrong if the answer is the second.
    if choices.count(right) > 1:
        raise DataError(f"{where}: two choices are the answer, {printable(right, 80)!r}")


def _check_shots(data: TaskData, shots: int) -> None:
    """Reject more few-shot examples than available rows, and test rows as few-shot examples."""
    if shots == 0:
        return
    split = data.file.fewshot_split or data.file.training_split
    if split is None or split == data.file.test_split:
        raise DataError(
            f"{data.path}: {shots} worked examples need fewshot_split, another one than test_split"
        )
    if len(data.rows[split]) < shots:
        raise DataError(
            f"{data.path}: {shots} worked examples are wanted; {split} has {len(data.rows[split])}"
        )
