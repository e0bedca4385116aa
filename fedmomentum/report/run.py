"""Reading a run folder: its settings, its plan and one row a round."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmomentum.errors import DataError, ModelError

# Names and reasons come from the wire. These characters are legal in neither XML nor UTF-8, or move the cursor.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Run:
    """What a run folder says about itself; `rows[0]` is the earliest round written, usually the untouched model."""

    name: str
    config_text: str
    environment: dict[str, Any]
    plan: dict[str, Any]
    partition: dict[str, dict[str, dict[str, int]]]
    rows: list[dict[str, Any]]


def read_run(run_dir: Path) -> Run:
    """Read a run folder, also of a run that is still going or was killed.

    Raises:
        ModelError: the folder, or one of the files that every run has, is missing.
        DataError: a file holds something else than a run writes; names the file and, for metrics, the line.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ModelError(f"There is no run folder {run_dir}. Give the folder that `fedmomentum run --out` wrote.")
    return Run(
        name=run_dir.resolve().name,
        config_text=_text(run_dir / "config.toml"),
        environment=_json_object(run_dir / "environment.json"),
        plan=_json_object(run_dir / "plan.json"),
        partition=_partition(run_dir / "partition.json"),
        rows=_rows(run_dir / "metrics.jsonl"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}, so it is not the folder of a run. "
            "Give the folder that `fedmomentum run --out` wrote."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Restore the file from a copy.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None


def _json_object(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}. Restore the file from a copy.") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, an object was expected.")
    return dict(_clean(value))


def _partition(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    partition = _json_object(path)
    for client_id, splits in partition.items():
        if not isinstance(splits, dict) or not all(isinstance(counts, dict) for counts in splits.values()):
            raise DataError(f'{path}: client {client_id} needs {{"train": {{category: count}}, "test": {{...}}}}.')
    return partition


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows by round. A resumed run may write a round again: the later one counts."""
    lines = _text(path).split("\n")
    # Every finished line ends with a newline, so what follows the last one is a row being written right now.
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                continue
            raise DataError(
                f"{path}, line {number} is not JSON: {error}. Remove that line, or restore the file from a copy."
            ) from None
        if not isinstance(row, dict) or type(row.get("round")) is not int:
            raise DataError(f'{path}, line {number} is not a row of metrics: it needs an integer "round".')
        rows[row["round"]] = _clean(row)
    if not rows:
        raise DataError(f"{path} has no finished row yet. Wait for the evaluation of the untouched model.")
    return [rows[server_round] for server_round in sorted(rows)]


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value
