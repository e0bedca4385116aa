"""Comparisons: method runs side by side, read from a comparison's directory or from single runs."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmomentum.config.toml import LOCATIONS, MAY_CHANGE
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.formats.run_files import ComparisonFile, ComparisonHead
from fedmomentum.formats.scores import NO_EXAMPLES
from fedmomentum.results.method_run import MethodRun, make_method_run
from fedmomentum.results.run_results import RunResults
from fedmomentum.utils.records import parse_record, read_file
from fedmomentum.utils.schema import parse_json

COMPARISON = "comparison.json"
FORMAT = "fedmomentum comparison"
FORMAT_VERSION = 3
COMPARED_KEYS = frozenset({"method.name", "method.settings", "run.seed"})
"""Settings in which the runs of a comparison differ intentionally."""
IRRELEVANT_KEYS = (MAY_CHANGE | LOCATIONS) - {"federation.num-rounds"}
"""Settings that no score depends on."""


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

    Runs are labeled by method and settings if labels and seeds are unique, else by directory. Runs
    of one method are its seeds only if they share all other settings; those that do not are labeled
    with the settings in which they differ.

    Raises:
        ConfigError: If a run is given twice.
        ModelError: If a run is missing; see `RunResults.load`.
        DataError: If a file is damaged, a config.toml is not TOML, or the runs have different
            objectives.
    """
    for directory, times in Counter(path.resolve() for path in directories).items():
        if times > 1:
            raise ConfigError(f"{directory} is given {times} times; a run counts once")
    # Settings are read from each run's config.toml.
    runs = [RunResults.load(directory) for directory in directories]
    settings = [read_settings(run) for run in runs]
    seeds = [int(table.get("run", {}).get("seed", 0)) for table in settings]
    labels = _labels(runs, settings)

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


def flat_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as `section.key` to value."""
    flat = {}
    for section, values in settings.items():
        if isinstance(values, dict):
            for key, value in values.items():
                flat[f"{section}.{key}"] = repr(value)
    return flat


def _labels(runs: Sequence[RunResults], settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the runs' labels: the method, with what sets runs of one method apart."""
    # Runs of one method with the same method settings.
    by_label: dict[str, list[int]] = {}
    for position, table in enumerate(settings):
        by_label.setdefault(_label(table), []).append(position)
    labels = [""] * len(runs)
    for label, positions in by_label.items():
        # Other settings in which they differ, apart from those that no score depends on.
        tables = [flat_settings(settings[position]) for position in positions]
        keys = sorted(_differing_keys(tables) - COMPARED_KEYS - IRRELEVANT_KEYS)
        # A default may have changed between two releases.
        methods = {runs[position].plan.method for position in positions}
        # Add what differs to the label, in the form of an override.
        for position, table in zip(positions, tables, strict=True):
            pairs = [f"{key}={table.get(key, 'not set')}" for key in keys]
            if len(methods) > 1:
                pairs.append(f"as {runs[position].plan.method}")
            separator = ";" if ":" in label else ":"
            labels[position] = label + (separator + ";".join(pairs) if pairs else "")
    return labels


def _differing_keys(tables: Sequence[Mapping[str, str]]) -> set[str]:
    """Return the keys whose values are not the same in all tables."""
    keys: set[str] = set()
    for table in tables:
        keys.update(table)
    return {key for key in keys if len({table.get(key) for table in tables}) > 1}


def _label(settings: dict[str, Any]) -> str:
    """Return a method with its settings, in the form that `compare --methods` accepts."""
    method = settings.get("method", {})
    name = str(method.get("name", "fedmomentum"))
    pairs = []
    for key, value in sorted((method.get("settings") or {}).items()):
        pairs.append(f"{key}={value}")
    return f"{name}:{';'.join(pairs)}" if pairs else name
