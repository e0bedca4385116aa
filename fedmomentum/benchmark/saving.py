"""Stores scores in benchmarks.json and the run's report page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.formats.benchmark_file import (
    BENCHMARK_FORMAT,
    BENCHMARK_VERSION,
    BENCHMARKS,
    BenchmarkFile,
    TaskResult,
    merge_results,
)
from fedmomentum.formats.directories import retained_rounds
from fedmomentum.formats.run_files import EnvironmentFile, read_facts
from fedmomentum.report import write_report
from fedmomentum.utils.io import write_json
from fedmomentum.utils.records import read_record, with_checksum


class ResultFile:
    """The file to which results are added.

    Args:
        path: The file; None to discard results.
        run: The directory of the run whose report shows them; None if there is no run.
        run_id: The run's id in its files.
    """

    def __init__(self, path: Path | None, run: Path | None, run_id: str | None) -> None:
        self._path = path
        self._run = run
        self._run_id = run_id
        self._tasks: list[TaskResult] = []
        if path is not None and path.exists():
            self._tasks = self._read(path)

    @classmethod
    def of(cls, model: Path, out: Path | None) -> ResultFile:
        """Return the file for a model's results.

        Args:
            model: The directory of a run, a global model or an adapter.
            out: The user's file; None for the run's.

        Raises:
            ConfigError: If the file cannot be written, or contains something else.
            ModelError: If the run's own files are missing or damaged.
        """
        if out is not None and not out.parent.is_dir():
            raise ConfigError(f"--out {out}: {out.parent} is no directory; create it")
        # Without a run, there is no directory for scores and no page.
        if not retained_rounds(model):
            return cls(out, None, None)
        try:
            _, run_id = read_facts(model / "environment.json", EnvironmentFile)
        except FileNotFoundError:
            raise ModelError(
                f"{model / 'environment.json'} is missing; it names the run. Restore it from a copy"
            ) from None
        return cls(out or model / BENCHMARKS, None if out else model, run_id)

    def _read(self, path: Path) -> list[TaskResult]:
        try:
            file = read_record(path, BenchmarkFile)
        except ModelError as error:
            raise ConfigError(
                f"{error}. Restore it from a copy, or move it away; scores are added to it"
            ) from error
        if file.run_id != self._run_id:
            raise ConfigError(
                f"{path} holds the scores of another run; move it away, or give another --out"
            )
        return file.tasks

    def add(self, result: TaskResult) -> None:
        """Add a result to the file."""
        if self._path is None:
            return
        self._tasks = merge_results(self._tasks, result)
        table: dict[str, Any] = {
            "run_id": self._run_id,
            "format": BENCHMARK_FORMAT,
            "format_version": BENCHMARK_VERSION,
            "tasks": msgspec.to_builtins(self._tasks),
        }
        write_json(self._path, with_checksum(table))

    def finish(self) -> list[Path]:
        """Write the run's report and return the written files."""
        written = [] if self._path is None else [self._path]
        if self._run is not None:
            written.append(write_report(self._run))
        return written
