"""Reading a run folder: its settings, its plan and one row a round, each checked before anything is made of it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmomentum.config import altered_settings
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.folders import check_last, kept_rounds, read_manifest, round_file
from fedmomentum.manifest import RunState
from fedmomentum.records import read_file
from fedmomentum.run_files import (
    METRICS,
    EnvironmentFile,
    PartitionFile,
    PlanFile,
    check_metrics,
    parse_row,
    read_facts,
    read_metrics,
)

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

    Where the folder has checkpoints, the last one says which rows and settings were committed. A copy without
    checkpoints is read too; then nothing vouches for its rows but their form.

    Raises:
        ModelError: the folder, or one of the files that every run has, is missing; or the last checkpoint is damaged.
        DataError: a file holds something else than the run wrote; names the file and the field or line.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ModelError(f"There is no run folder {run_dir}. Give the folder that `fedmomentum run --out` wrote.")
    try:
        config_text = _text(run_dir / "config.toml")
        tables, owners = {}, set()
        for name, kind in (("environment", EnvironmentFile), ("plan", PlanFile), ("partition", PartitionFile)):
            table, run_id = read_facts(run_dir / f"{name}.json", kind, DataError)
            tables[name] = _clean(table)
            owners.add(run_id)
        committed = _last_checkpoint(run_dir)
        rows = _rows(run_dir / METRICS, committed)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise ModelError(
            f"{run_dir} has no {name}, so it is not the folder of a run. "
            "Give the folder that `fedmomentum run --out` wrote."
        ) from None
    except (DataError, ConfigError) as error:
        raise DataError(f"{str(error).rstrip('.')}. Restore the file from a copy.") from None
    if committed is not None:
        _check_settings(config_text, committed, run_dir)
        owners.add(committed.run_id)
    if len(owners) > 1:
        raise DataError(
            f"{run_dir} holds files of several runs: environment.json, plan.json, partition.json and the checkpoints "
            "do not name the same. Restore them from a copy."
        )
    return Run(
        name=run_dir.resolve().name,
        config_text=config_text,
        environment=tables["environment"],
        plan=tables["plan"],
        partition=tables["partition"]["clients"],
        rows=rows,
    )


def _last_checkpoint(run_dir: Path) -> RunState | None:
    """The state in the last checkpoint; None in a folder that has none."""
    rounds = kept_rounds(run_dir)
    if not rounds:
        return None
    check_last(run_dir, rounds[-1])
    try:
        return read_manifest(round_file(run_dir, rounds[-1])).run
    except ModelError as error:
        raise ModelError(f"{error}. Restore it from a copy.") from error


def _check_settings(config_text: str, committed: RunState, run_dir: Path) -> None:
    """Refuse a config.toml that is not what the run was made with."""
    try:
        altered = altered_settings(config_text, committed.settings)
    except ConfigError as error:
        raise DataError(f"{run_dir / 'config.toml'} is {error}. Restore the file from a copy.") from None
    if altered:
        raise DataError(
            f"{run_dir / 'config.toml'} was altered since the last checkpoint; these settings differ: "
            f"{', '.join(altered)[:500]}. Restore the file from a copy."
        )


def _text(path: Path) -> str:
    try:
        return read_file(path, error=DataError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _rows(path: Path, committed: RunState | None) -> list[dict[str, Any]]:
    """The rows by round. A row without the end of its line is being written."""
    lines = read_metrics(path, DataError)
    if committed is not None:
        check_metrics(lines, committed.metrics, path, DataError)
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = parse_row(line, f"{path}, line {number}", DataError)
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
