"""metrics.jsonl: encode, parse and check its rows; every row is a `RoundRecord`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fedmomentum.errors import DataError, FedMomentumError, ModelError
from fedmomentum.formats.manifest import MetricsPrefix
from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.formats.scores import Score
from fedmomentum.utils.records import MAX_JSON_BYTES, read_file
from fedmomentum.utils.schema import check_free_form, parse_json, validation_message

METRICS = "metrics.jsonl"


def encode_record(record: RoundRecord) -> bytes:
    """Return a record as a line of metrics.jsonl.

    Raises:
        ModelError: If it holds a non-finite number, or a field of another type than declared.
    """
    name = f"the metrics of round {record.round}"
    row = record.to_json()
    try:
        text = json.dumps(row, allow_nan=False)
        if (
            "\\ud" in text
        ):  # a lone surrogate, from a user's data, is invalid text to strict readers
            text = json.dumps(_without_surrogates(row), allow_nan=False)
        line = text.encode() + b"\n"
    except ValueError as problem:
        raise ModelError(f"{name} hold a number that is not finite: {problem}") from problem
    parse_record_line(line, name, ModelError)
    return line


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, (list, tuple)):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, Mapping):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def parse_record_line(
    line: bytes | str, name: str, error: type[FedMomentumError] = DataError
) -> RoundRecord:
    """Return the record in a line of metrics.jsonl.

    Args:
        line: The line.
        name: What to call it in messages.
        error: The error to raise.

    Raises:
        FedMomentumError: If it is not a record; the message names the field.
    """
    row = parse_json(line, dict[str, Any], name, error)
    # A row grows with the number of clients, for which there is no limit.
    check_free_form(row, name, error, max_items=math.inf)
    evaluation = row.get("evaluation")
    if isinstance(evaluation, dict):
        _keep_sums(evaluation)
    try:
        return msgspec.convert(row, RoundRecord)
    except msgspec.ValidationError as problem:
        raise error(f"{name}: {validation_message(problem, row)}") from problem


def _keep_sums(evaluation: dict[str, Any]) -> None:
    """Drop figures derived from sums from each score of a row: they are recomputed, not trusted."""
    places = [(evaluation, "total"), (evaluation, "compared")]
    for key in ("by_client", "by_category"):
        group = evaluation.get(key)
        if isinstance(group, dict):
            places += [(group, name) for name in group]
    for group, name in places:
        score = group.get(name)
        if isinstance(score, dict):
            group[name] = {key: score[key] for key in Score.__struct_fields__ if key in score}
            by_label = score.get("by_label")
            for counts in by_label.values() if isinstance(by_label, dict) else ():
                if isinstance(counts, dict):
                    counts.pop("f1", None)


def read_metrics(path: Path, error: type[FedMomentumError] = DataError) -> list[bytes]:
    """Return the complete lines of metrics.jsonl, including newlines.

    Anything after the last newline is still being written.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it cannot be read.
    """
    lines = read_file(path, max_bytes=4 * MAX_JSON_BYTES, error=error).split(b"\n")
    return [line + b"\n" for line in lines[:-1]]


def metrics_prefix(lines: Sequence[bytes]) -> MetricsPrefix:
    """Return what a checkpoint records of these lines."""
    return MetricsPrefix(rows=len(lines), sha256=hashlib.sha256(b"".join(lines)).hexdigest())


def check_metrics(
    lines: Sequence[bytes],
    wanted: MetricsPrefix,
    path: Path,
    error: type[FedMomentumError] = ModelError,
) -> None:
    """Refuse lines other than those with which a checkpoint was committed.

    Rows after them are not checked.

    Raises:
        FedMomentumError: If a row is missing or was altered.
    """
    if len(lines) < wanted.rows:
        raise error(
            f"{path} has {len(lines)} rows, and {wanted.rows} were committed; rows are missing"
        )
    if metrics_prefix(lines[: wanted.rows]) != wanted:
        raise error(
            f"{path} was damaged or altered: its first {wanted.rows} rows are not those that were "
            "committed"
        )
