"""Task files: YAML in the format of lm-evaluation-harness, and the rows of their data.

In that format, a file may name Python functions and data to download. Here it may do neither: all
fields are declared, only our own function can be named, and data must be local JSON Lines files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from fedmomentum.benchmark.programs import COLUMNS
from fedmomentum.errors import ConfigError, DataError
from fedmomentum.formats.benchmark_file import ExtractionName, MetricName, TaskName
from fedmomentum.utils.io import sha256
from fedmomentum.utils.records import read_file
from fedmomentum.utils.schema import Schema, parse_json, validation_message
from fedmomentum.utils.text import printable

MAX_YAML_BYTES = 2**20
PASS_AT_1 = "fedmomentum.benchmark.programs.pass_at_1"
FUNCTIONS = (PASS_AT_1,)
"""The functions that `!function` may name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Row = dict[str, Any]


# ── the format ────────────────────────────────────────────────────────────────────────────────────


class DataFiles(Schema, frozen=True, kw_only=True):
    """Split -> JSON Lines file, relative to the task file."""

    data_files: Annotated[dict[str, str], Meta(min_length=1)]


class Sampling(Schema, frozen=True, kw_only=True):
    """How few-shot examples are chosen: at random with a fixed seed, or the first ones."""

    sampler: Literal["default", "first_n"] = "default"


class Metric(Schema, frozen=True, kw_only=True):
    """One metric; the last four fields are for `exact_match`."""

    metric: MetricName
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes_to_ignore: list[str] = []


class FilterStep(Schema, frozen=True, kw_only=True):
    """One step in extracting the text to compare from an answer."""

    function: Literal["regex", "take_first", "remove_whitespace", "lowercase", "uppercase"]
    regex_pattern: str | None = None
    group_select: int | None = None
    fallback: str | None = None


class AnswerFilter(Schema, frozen=True, kw_only=True):
    """A way of extracting the answer; each gives separate scores under its name."""

    name: Annotated[ExtractionName, Meta(min_length=1)]
    filter: Annotated[list[FilterStep], Meta(min_length=1)]


class Generation(Schema, frozen=True, kw_only=True):
    """How answers are generated: greedily, up to a stop text."""

    until: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]
    max_gen_toks: Annotated[int, Meta(ge=1, le=2**20)] = 256
    do_sample: Literal[False] = False
    temperature: Annotated[float, Meta(ge=0, le=0)] = 0.0


class TaskFile(Schema, frozen=True, kw_only=True):
    """A task: how its rows become prompts, and how answers are scored.

    The fields are those of lm-evaluation-harness. `tag`, `task_alias` and `metadata` are accepted
    but not used.
    """

    task: TaskName
    dataset_path: Literal["json"]
    dataset_kwargs: DataFiles
    test_split: str
    output_type: Literal["multiple_choice", "generate_until"]
    doc_to_text: str
    doc_to_target: str | int
    metric_list: Annotated[list[Metric], Meta(min_length=1)]
    doc_to_choice: str | list[str] | None = None
    training_split: str | None = None
    fewshot_split: str | None = None
    num_fewshot: Annotated[int, Meta(ge=0, le=1000)] = 0
    fewshot_config: Sampling = Sampling()
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    generation_kwargs: Generation | None = None
    filter_list: list[AnswerFilter] = []
    process_results: Literal["fedmomentum.benchmark.programs.pass_at_1"] | None = None
    unsafe_code: bool = False
    repeats: Literal[1] = 1
    tag: str | list[str] | None = None
    task_alias: str | None = None
    metadata: Any = None

    @property
    def runs_code(self) -> bool:
        """Whether answers are programs to run."""
        return self.process_results is not None

    def __post_init__(self) -> None:
        """Check that the fields are consistent; msgspec reports a ValueError with the file."""
        is_choice = self.output_type == "multiple_choice"
        metrics = {metric.metric for metric in self.metric_list}
        if self.runs_code:
            wanted = {"pass_at_1"}
        elif is_choice:
            wanted = {"acc", "acc_norm", "acc_bytes"}
        else:
            wanted = {"exact_match"}
        if not metrics <= wanted or len(metrics) < len(self.metric_list):
            raise ValueError(
                f"metric_list: {', '.join(sorted(metrics))}; such a task has "
                f"{', '.join(sorted(wanted))}, each once"
            )
        if is_choice != (self.doc_to_choice is not None):
            raise ValueError("doc_to_choice: tasks of multiple_choice have it, and no others")
        if is_choice == (self.generation_kwargs is not None):
            raise ValueError("generation_kwargs: tasks of generate_until have it, and no others")
        if self.unsafe_code != self.runs_code or (self.runs_code and is_choice):
            raise ValueError(
                f"unsafe_code: true, process_results: !function {PASS_AT_1} and generate_until "
                "belong together"
            )
        self._check_texts(is_choice)

    def _check_texts(self, is_choice: bool) -> None:
        """Reject templates in the description, unusable filters and invalid regular expressions."""
        # lm-eval would render it without a sandbox.
        if "{{" in self.description or "{%" in self.description or "{#" in self.description:
            raise ValueError("description: no template; a plain text")
        names = [extraction.name for extraction in self.filter_list]
        if len(set(names)) < len(names) or (names and (is_choice or self.runs_code)):
            raise ValueError(
                "filter_list: each name once, and for answers that are compared with exact_match"
            )
        for extraction in self.filter_list:
            # Without it, a filter's result is a list, which never equals an answer.
            if extraction.filter[-1].function != "take_first":
                raise ValueError(f"filter_list: {extraction.name} must end in take_first")
        patterns = [step.regex_pattern for f in self.filter_list for step in f.filter]
        for metric in self.metric_list:
            patterns += metric.regexes_to_ignore
        for pattern in patterns:
            try:
                re.compile(pattern or "")
            except re.error as problem:
                raise ValueError(f"{pattern!r} is no regular expression: {problem}") from None


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


class TaskData(msgspec.Struct, frozen=True, kw_only=True):
    """A task file with its rows.

    Attributes:
        file: The file's contents.
        path: The file's path.
        rows: Split -> rows.
        sha256: The hash of the task file and its data files.
    """

    file: TaskFile
    path: Path
    rows: dict[str, list[Row]]
    sha256: str


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader for plain values, without aliases, that knows our functions by name."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise DataError(f"line {self.peek_event().start_mark.line + 1}: no aliases (*name)")
        return super().compose_node(parent, index)


def _function(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    name = str(node.value)
    if name not in FUNCTIONS:
        raise DataError(
            f"line {node.start_mark.line + 1}: !function {printable(name, 80)}: a task file may "
            f"not bring Python code; the only function is {PASS_AT_1}"
        )
    return name


_Loader.add_constructor("!function", _function)


def read_task(directory: Path, name: str) -> TaskData:
    """Read `<name>.yaml` and its data.

    Args:
        directory: Where the task files are.
        name: The task's name.

    Raises:
        ConfigError: If there is no such task.
        DataError: If the file is not a task file, names a function that is not ours, or its data
            is missing or malformed.
    """
    path = directory / f"{name}.yaml"
    if not _NAME.fullmatch(name) or not path.is_file():
        known = sorted(file.stem for file in directory.glob("*.yaml")) if directory.is_dir() else []
        there = f"its tasks are {', '.join(known[:20])}" if known else "it has no task files"
        raise ConfigError(
            f"--tasks: no task {printable(name, 80)!r} in {directory} ({there}). Give the "
            "directory of task files by --data; docs/benchmarks.md says how to make one"
        )
    text = read_file(path, max_bytes=MAX_YAML_BYTES, error=DataError)
    file = parse_task(text, str(path))
    if file.task != name:
        raise DataError(f"{path}: task is {file.task!r}; it must be the file's name, {name!r}")
    # Read only the splits that are used, each from its own file.
    used = {file.test_split}
    used |= {split for split in (file.fewshot_split, file.training_split) if split is not None}
    rows = {}
    hashes = [sha256(text)]
    for split in sorted(used):
        if split not in file.dataset_kwargs.data_files:
            raise DataError(f"{path}: dataset_kwargs.data_files has no split {split!r}")
        rows[split], digest = _read_rows(path.parent / file.dataset_kwargs.data_files[split], path)
        hashes.append(digest)
    return TaskData(file=file, path=path, rows=rows, sha256=sha256("\n".join(hashes).encode()))


def parse_task(text: bytes, name: str) -> TaskFile:
    """Parse a task file.

    Raises:
        DataError: If it is not YAML or does not match the declared fields.
    """
    try:
        table = yaml.load(text, Loader=_Loader)
        return msgspec.convert(table, TaskFile)
    except DataError as problem:
        raise DataError(f"{name}, {problem}") from None
    except msgspec.ValidationError as problem:
        raise DataError(f"{name}: {validation_message(problem, table)}") from problem
    # such as a nonexistent date, a list as a key, or endless nesting
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as problem:
        raise DataError(f"{name}: not valid YAML: {' '.join(str(problem).split())}") from problem


def _read_rows(path: Path, owner: Path) -> tuple[list[Row], str]:
    """Return the rows of a JSON Lines file, which must all have the same columns, and its hash."""
    try:
        data = read_file(path, error=DataError)
    except FileNotFoundError:
        raise DataError(
            f"{owner}: there is no file {path}; data are local JSON Lines files, relative to the "
            "task file"
        ) from None
    rows: list[Row] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            row = parse_json(line, dict[str, Any], f"{path}, line {number}", DataError)
            if rows and row.keys() != rows[0].keys():
                raise DataError(
                    f"{path}, line {number}: its columns are {printable(', '.join(row), 200)}; "
                    f"those of the first row are {printable(', '.join(rows[0]), 200)}"
                )
            rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows, sha256(data)


def check_program_columns(task: TaskData) -> None:
    """Reject a program task whose rows lack a column.

    Raises:
        DataError: If one is missing or not text.
    """
    for number, row in enumerate(task.rows[task.file.test_split], start=1):
        for column in COLUMNS:
            if not isinstance(row.get(column), str):
                raise DataError(f"{task.path}: row {number} has no text in column {column!r}")
