"""RunResults: a run directory's settings, plan and rounds; each file is checked when read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedmomentum.config.toml import altered_settings
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.formats.benchmark_file import BENCHMARKS, BenchmarkFile
from fedmomentum.formats.directories import (
    check_last_round,
    last_committed_round,
    read_manifest,
    retained_rounds,
    round_file,
)
from fedmomentum.formats.manifest import ModelFile, RunState
from fedmomentum.formats.metrics_file import METRICS, check_metrics, parse_record_line, read_metrics
from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.formats.run_files import EnvironmentFile, PartitionFile, PlanFile, read_facts
from fedmomentum.formats.status_file import read_status
from fedmomentum.results.benchmarks import BenchmarkResults, current_benchmarks
from fedmomentum.utils.records import read_file, read_record
from fedmomentum.utils.text import CONTROL_CHARACTERS

_UNPRINTABLE = re.compile(f"(?![\t\n])[{CONTROL_CHARACTERS}]")
"""Characters that are illegal in XML or UTF-8, move the cursor, or change text direction.

Client names and failure reasons come over the wire.
"""

_RESTORE = "Restore the file from a copy."

T = TypeVar("T", PlanFile, PartitionFile, RoundRecord, BenchmarkFile)


@dataclass(frozen=True)
class RunResults:
    """What a run directory says about its run.

    Attributes:
        name: The directory's name.
        config_text: The run's config.toml.
        environment: Versions, device and the like, from environment.json.
        plan: The estimated cost of the run.
        partition: Client to `train` and `test` to category to number of examples.
        rounds: One record per round, in order; the first is usually the base model's evaluation.
        checkpoint: The last checkpoint's manifest; None in a copy without checkpoints.
        benchmarks: Scores on standard benchmarks; None if there are none.
        is_served: Whether the clients were on other machines.
    """

    name: str
    config_text: str
    environment: dict[str, Any]
    plan: PlanFile
    partition: dict[str, dict[str, dict[str, int]]]
    rounds: list[RoundRecord]
    checkpoint: ModelFile | None
    benchmarks: BenchmarkResults | None = None
    is_served: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether the last of the planned rounds is recorded."""
        return bool(self.rounds) and self.rounds[-1].round >= self.plan.num_rounds

    @classmethod
    def load(cls, directory: str | Path, *, may_be_empty: bool = False) -> RunResults:
        """Read a run directory, even of a run that is in progress or was killed.

        If there are checkpoints, the last one says which rounds and settings were committed. A copy
        without checkpoints can be read, too, but then only the form of its rounds is checked.

        Args:
            directory: What `fedmomentum run --out` wrote.
            may_be_empty: Accept a run without any finished round.

        Raises:
            ModelError: If the directory, or a file that every run has, is missing, or the last
                checkpoint is damaged.
            DataError: If a file holds something other than what the run wrote; the message names
                the file and the field or line.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelError(
                f"There is no run directory {directory}. Give the directory that `fedmomentum run "
                "--out` wrote."
            )
        try:
            return _read(directory, may_be_empty)
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            if last_committed_round(directory) is not None or retained_rounds(directory):
                raise ModelError(
                    f"{directory} is the directory of a run, but its {missing} is missing; restore "
                    "it from a copy"
                ) from None
            if any(directory.glob("*/seed-*/config.toml")):
                raise ModelError(
                    f"{directory} is the directory of a comparison that is not finished; the same "
                    "`fedmomentum compare` continues it"
                ) from None
            raise ModelError(
                f"{directory} has no {missing}, so it is not the directory of a run. Give the "
                "directory that `fedmomentum run --out` wrote."
            ) from None


def _read(directory: Path, may_be_empty: bool) -> RunResults:
    """Read all files of a run, and check that they belong together."""
    # Read each file, checked by its own type.
    try:
        config_text = _read_text(directory / "config.toml")
        plan = _printable(read_record(directory / "plan.json", PlanFile, DataError))
        partition = _printable(read_record(directory / "partition.json", PartitionFile, DataError))
        # The environment's table is shown as it is, including fields from newer releases.
        table, environment_run_id = read_facts(
            directory / "environment.json", EnvironmentFile, DataError
        )
        checkpoint = _read_last_checkpoint(directory)
        committed = checkpoint.run if checkpoint else None
        rounds: list[RoundRecord] = []
        if committed is not None or not may_be_empty or (directory / METRICS).is_file():
            rounds = _read_rounds(directory / METRICS, committed)
        scores = _read_benchmarks(directory / BENCHMARKS)
    except (DataError, ConfigError) as error:
        raise DataError(f"{str(error).rstrip('.')}. {_RESTORE}") from None

    # All files must belong to the same run, and the settings to its last checkpoint.
    run_ids = {plan.run_id, partition.run_id, environment_run_id}
    if scores is not None:
        run_ids.add(scores.run_id)
    if committed is not None:
        _check_settings(config_text, committed, directory / "config.toml")
        run_ids.add(committed.run_id)
    if len(run_ids) > 1:
        raise DataError(
            f"{directory} holds files of several runs: environment.json, plan.json, "
            f"partition.json, {BENCHMARKS} and the checkpoints do not name the same run. Restore "
            "them from a copy."
        )
    return RunResults(
        name=directory.resolve().name,
        config_text=config_text,
        environment=_replace_unprintable(table),
        plan=plan,
        partition=_as_plain_partition(partition),
        rounds=rounds,
        checkpoint=checkpoint,
        benchmarks=current_benchmarks(scores, directory, rounds) if scores else None,
        is_served=_is_served(directory),
    )


def _is_served(directory: Path) -> bool:
    """Return whether a server for clients on other machines has written the run's status."""
    try:
        return read_status(directory).networked
    # Runs on one machine have a status only if they were watched.
    except ModelError:
        return False


def _read_benchmarks(path: Path) -> BenchmarkFile | None:
    """Return the scores on standard benchmarks; None if the run has none."""
    try:
        return _printable(read_record(path, BenchmarkFile, DataError))
    except FileNotFoundError:
        return None


def _as_plain_partition(partition: PartitionFile) -> dict[str, dict[str, dict[str, int]]]:
    clients = {}
    for client, splits in partition.clients.items():
        clients[client] = {str(split): counts for split, counts in splits.items()}
    return clients


def _read_last_checkpoint(directory: Path) -> ModelFile | None:
    """Return the last checkpoint; None if the directory has none."""
    rounds = retained_rounds(directory)
    if not rounds:
        return None
    check_last_round(directory, rounds[-1])
    try:
        return read_manifest(round_file(directory, rounds[-1]))
    except ModelError as error:
        raise ModelError(f"{error}. Restore it from a copy.") from error


def _check_settings(config_text: str, committed: RunState, path: Path) -> None:
    """Refuse a config.toml that does not hold the settings of the last checkpoint."""
    try:
        altered = altered_settings(config_text, committed.settings)
    except ConfigError as error:
        raise DataError(f"{path} is {error}. {_RESTORE}") from None
    if altered:
        keys = ", ".join(altered)[:500]
        raise DataError(
            f"{path} was altered since the last checkpoint; these settings differ: {keys}. "
            f"{_RESTORE}"
        )


def _read_text(path: Path) -> str:
    try:
        return read_file(path, error=DataError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _read_rounds(path: Path, committed: RunState | None) -> list[RoundRecord]:
    """Read the complete lines of metrics.jsonl, sorted by round."""
    lines = read_metrics(path, DataError)
    if committed is not None:
        check_metrics(lines, committed.metrics, path, DataError)
    # A round that was retrained after a crash has a second line, which takes precedence.
    by_round: dict[int, RoundRecord] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _printable(parse_record_line(line, f"{path}, line {number}", DataError))
            by_round[record.round] = record
    if not by_round:
        raise DataError(
            f"{path} has no finished row yet. Wait for the evaluation of the base model."
        )
    return [by_round[server_round] for server_round in sorted(by_round)]


def _printable(record: T) -> T:
    """Return a record without unprintable characters."""
    table = _replace_unprintable(msgspec.to_builtins(record))
    return msgspec.convert(table, type(record))


def _replace_unprintable(value: Any) -> Any:
    """Return JSON values with unprintable characters replaced by U+FFFD."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_replace_unprintable(item) for item in value]
    if isinstance(value, dict):
        table = {}
        for key, item in value.items():
            table[_replace_unprintable(key)] = _replace_unprintable(item)
        return table
    return value
