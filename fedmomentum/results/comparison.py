"""Comparisons: method runs side by side, read from a comparison's directory or from single runs."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmomentum.errors import DataError, ModelError
from fedmomentum.formats.run_files import ComparisonFile, ComparisonHead
from fedmomentum.formats.scores import NO_EXAMPLES
from fedmomentum.results.method_run import MethodRun, make_method_run
from fedmomentum.results.run_results import RunResults
from fedmomentum.utils.records import parse_record, read_file
from fedmomentum.utils.schema import parse_json

COMPARISON = "comparison.json"
FORMAT = "fedmomentum comparison"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Comparison:
    """Method runs, and what they are compared with.

    Attributes:
        name: The comparison's name.
        method_runs: One per method and seed.
        baseline: The method relative to which differences are computed.
        target: The exact match until which rounds, bytes and seconds are counted.
        command: The command that makes the comparison; None for single runs.
    """

    name: str
    method_runs: tuple[MethodRun, ...]
    baseline: str
    target: float
    command: str | None = None

    @property
    def methods(self) -> list[str]:
        """The methods, in the order given."""
        return list(dict.fromkeys(one.method for one in self.method_runs))

    @property
    def measure(self) -> str:
        """What the runs' exact match is called."""
        measures = (one.measure for one in self.method_runs if one.measure is not None)
        return next(measures, NO_EXAMPLES.measure)

    @property
    def loss_unit(self) -> str:
        """The unit of the runs' losses."""
        return self.method_runs[0].loss_unit

    def runs_of(self, method: str) -> list[MethodRun]:
        """Return the runs of one method, one per seed."""
        return [one for one in self.method_runs if one.method == method]


def read_comparison(directory: Path) -> Comparison:
    """Read what `fedmomentum compare` wrote.

    Raises:
        ModelError: If there is no comparison, or one of its runs is missing.
        DataError: If a file is damaged or has another format version.
    """
    directory = Path(directory)
    file = directory / COMPARISON
    try:
        table = _parse_comparison(read_file(file, error=DataError), str(file))
    except FileNotFoundError as error:
        raise ModelError(
            f"{directory} holds no {COMPARISON}; give the directory that `fedmomentum compare` "
            "wrote"
        ) from error
    except DataError as error:
        raise DataError(f"{error}; run the comparison again, finished runs are kept") from error
    method_runs = []
    for cell in table.cells:
        runs = [RunResults.load(directory / name) for name in cell.folders]
        method_runs.append(make_method_run(cell.method, cell.seed, runs, kind=cell.kind))
    return Comparison(
        directory.resolve().name, tuple(method_runs), table.baseline, table.target, table.command
    )


def _parse_comparison(data: bytes, name: str) -> ComparisonFile:
    head = parse_json(data, ComparisonHead, name, DataError)
    if (head.format, head.format_version) != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{name} is of another format than {FORMAT} {FORMAT_VERSION}, or of another version"
        )
    return parse_record(data, ComparisonFile, name, DataError)


def compare_runs(directories: Sequence[Path], target: float) -> Comparison:
    """Compare single runs; the first one's method is the baseline.

    Runs are labeled by method and settings if labels and seeds are unique, else by directory.

    Raises:
        ModelError: If a run is missing; see `RunResults.load`.
        DataError: If a file is damaged, a config.toml is not TOML, or the runs have different
            objectives.
    """
    # Settings are read from each run's config.toml.
    runs = [RunResults.load(directory) for directory in directories]
    settings = [read_settings(run) for run in runs]
    seeds = [int(table.get("run", {}).get("seed", 0)) for table in settings]
    labels = [_label(table) for table in settings]

    # Only directories distinguish two runs with the same method and seed.
    if len(set(zip(labels, seeds, strict=True))) < len(runs):
        labels = [str(directory) for directory in directories]
    method_runs = []
    for run, label, seed in zip(runs, labels, seeds, strict=True):
        method_runs.append(make_method_run(label, seed, [run]))

    measures = sorted({one.measure for one in method_runs if one.measure is not None})
    if len(measures) > 1:
        raise DataError(
            f"the runs report different things, {' and '.join(measures)}; compare runs with the "
            "same training.objective"
        )

    # In the order in which the methods were given, then by seed.
    method_runs.sort(key=lambda one: (labels.index(one.method), one.seed))
    name = ", ".join(dict.fromkeys(run.name for run in runs))
    return Comparison(name, tuple(method_runs), labels[0], target)


def read_settings(run: RunResults) -> dict[str, Any]:
    """Return the run's config.toml as tables.

    Raises:
        DataError: If it is not TOML.
    """
    try:
        return tomllib.loads(run.config_text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(
            f"config.toml of {run.name} is not TOML: {error}. Restore the file from a copy."
        ) from None


def _label(settings: dict[str, Any]) -> str:
    """Return a method with its settings, in the form that `compare --methods` accepts."""
    method = settings.get("method", {})
    name = str(method.get("name", "fedmomentum"))
    pairs = []
    for key, value in sorted((method.get("settings") or {}).items()):
        pairs.append(f"{key}={value}")
    return f"{name}:{';'.join(pairs)}" if pairs else name
