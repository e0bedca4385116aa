"""The cells of a comparison, a method and a seed each, read from run folders; and what they say together."""

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmomentum.errors import DataError, ModelError
from fedmomentum.records import parse_record, read_file
from fedmomentum.report.run import Run, read_run
from fedmomentum.report.statistics import Mean, mean_of
from fedmomentum.report.summary import federated_row
from fedmomentum.run_files import ComparisonFile, ComparisonHead
from fedmomentum.schema import parse_json

COMPARISON = "comparison.json"
FORMAT, FORMAT_VERSION = "fedmomentum comparison", 2


@dataclass(frozen=True)
class Point:
    """A cell after one round; None where something was not measured.

    Scores are over the items that every evaluation of a run has; bytes and seconds are sums from the start.
    """

    round: int
    exact_match: float | None = None
    loss: float | None = None
    num_bytes: float | None = None
    seconds: float | None = None
    retained_energy: float | None = None
    residual_rank: float | None = None
    angle_a: float | None = None
    angle_b: float | None = None
    update_cosine: float | None = None


@dataclass(frozen=True)
class Cell:
    """One method with one seed.

    Attributes:
        method: as it is called in the comparison.
        seed: the run's seed.
        points: round by round; the mean over the clients for a method of several runs (`local`).
        exact_match: on all held-out items, after the last evaluated round; None without an evaluation.
        loss: likewise.
        num_examples: how many items those are.
        by_client: client to its (exact match, loss) on its own items.
        runs: the runs it was read from.
        kind: `federated`, `centralised` or `local`; the last two are references and send nothing.
    """

    method: str
    seed: int
    points: tuple[Point, ...]
    exact_match: float | None
    loss: float | None
    num_examples: int | None
    by_client: dict[str, tuple[float, float]]
    runs: tuple[Run, ...]
    kind: str = "federated"

    def best(self, name: str, better: Callable[[list[float]], float]) -> float | None:
        """The best score of any round after the untouched model."""
        values = [getattr(point, name) for point in self.points if point.round > 0]
        found = [value for value in values if value is not None and math.isfinite(value)]
        return better(found) if found else None

    def first(self, target: float) -> Point | None:
        """The first round whose exact match reaches the target."""
        return next((p for p in self.points if p.exact_match is not None and p.exact_match >= target), None)


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds. Differences are to the baseline, paired by seed, over the seeds that both have."""

    method: str
    seeds: tuple[int, ...]
    exact_match: Mean | None
    loss: Mean | None
    best_exact_match: Mean | None
    best_loss: Mean | None
    exact_match_difference: Mean | None
    loss_difference: Mean | None
    reached: int
    rounds_to_target: Mean | None
    bytes_to_target: Mean | None
    seconds_to_target: Mean | None


@dataclass(frozen=True)
class Comparison:
    """Cells, and what is compared with what."""

    name: str
    cells: tuple[Cell, ...]
    baseline: str
    target: float
    command: str | None = None

    @property
    def methods(self) -> list[str]:
        """The methods in the order given."""
        return list(dict.fromkeys(cell.method for cell in self.cells))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def make_cell(method: str, seed: int, runs: Sequence[Run], *, kind: str = "federated") -> Cell:
    """A cell of the runs in it: one, or one a client where clients are alone.

    Args:
        method: its name in the comparison.
        seed: the runs' seed.
        runs: at least one.
        kind: see `Cell`. The items' categories of a reference are the clients that hold them out
            (as `fedmomentum.compare` makes them).
    """
    rounds = set.intersection(*({row["round"] for row in run.rows} for run in runs))
    parts = [[point for point in _points(run) if point.round in rounds] for run in runs]
    points = tuple(_joined(column, sends=kind == "federated") for column in zip(*parts, strict=True))
    finals = [_score(federated_row(run.rows), "total") for run in runs]
    scores = [score for score in finals if score]
    by_client: dict[str, tuple[float, float]] = {}
    for run in runs:
        groups = ((federated_row(run.rows) or {}).get("evaluation") or {}).get(
            "by_client" if kind == "federated" else "by_category"
        ) or {}
        for client, score in groups.items():
            # a client alone: its own model on its own items
            if score["num_examples"] and (kind != "local" or client in run.partition):
                by_client[client] = score["exact_match"], score["loss"]
    whole = len(scores) == len(runs)
    return Cell(
        method, seed, points,
        _mean([score["exact_match"] for score in scores]) if whole else None,
        _mean([score["loss"] for score in scores]) if whole else None,
        scores[0]["num_examples"] if whole else None, by_client, tuple(runs), kind,
    )  # fmt: skip


def _points(run: Run) -> list[Point]:
    points, num_bytes, seconds = [], 0.0, 0.0
    for row in run.rows:
        num_bytes += sum((row.get("uplink_bytes") or {}).values()) + sum((row.get("downlink_bytes") or {}).values())
        seconds += sum(value or 0.0 for value in (row.get("seconds") or {}).values())
        score = _score(row, "compared") or _score(row, "total") or {}
        diagnostics = row.get("diagnostics") or {}
        angles = diagnostics.get("subspace_angle") or {}
        points.append(
            Point(
                row["round"],
                score.get("exact_match"),
                score.get("loss"),
                num_bytes,
                seconds,
                row.get("retained_energy"),
                row.get("residual_rank"),
                angles.get("A"),
                angles.get("B"),
                diagnostics.get("update_cosine"),
            )  # fmt: skip
        )
    return points


def _joined(column: Sequence[Point], *, sends: bool) -> Point:
    """Several clients' runs after one round: the mean, and the time of all, which train in turn."""
    values = {
        name: _mean([getattr(point, name) for point in column])
        for name in Point.__dataclass_fields__
        if name not in ("round", "seconds", "num_bytes")
    }
    seconds = sum(point.seconds or 0.0 for point in column)
    return Point(column[0].round, num_bytes=column[0].num_bytes if sends else None, seconds=seconds, **values)


def _score(row: dict[str, Any] | None, key: str) -> dict[str, Any] | None:
    score = ((row or {}).get("evaluation") or {}).get(key)
    return score if score and score["num_examples"] else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def read_comparison(folder: Path) -> Comparison:
    """What `fedmomentum compare` left in a folder.

    Raises:
        ModelError: no comparison there, or a run of it is missing.
        DataError: a file that is damaged, or of a newer format.
    """
    folder = Path(folder)
    file = folder / COMPARISON
    again = "run the comparison again, finished runs are kept"
    try:
        data = read_file(file, error=DataError)
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no {COMPARISON}; give the folder that `fedmomentum compare` wrote") from error
    except DataError as error:
        raise DataError(f"{error}; {again}") from error
    try:
        head = parse_json(data, ComparisonHead, str(file), DataError)
        if (head.format, head.format_version) != (FORMAT, FORMAT_VERSION):
            raise DataError(f"{file} is of another format than {FORMAT} {FORMAT_VERSION}, or of another version")
        table = parse_record(data, ComparisonFile, str(file), DataError)
    except DataError as error:
        raise DataError(f"{error}; {again}") from error
    cells = tuple(
        make_cell(one.method, one.seed, [read_run(folder / name) for name in one.folders], kind=one.kind)
        for one in table.cells
    )
    return Comparison(folder.resolve().name, cells, table.baseline, table.target, table.command)


def compare_runs(folders: Sequence[Path], target: float) -> Comparison:
    """Single runs as a comparison: by method and settings where seeds tell the rest apart, else by folder.

    Raises:
        ModelError: see `read_run`.
        DataError: likewise, or a config.toml that is none.
    """
    runs = [read_run(folder) for folder in folders]
    tables = [settings_of(run) for run in runs]
    seeds = [int(table.get("run", {}).get("seed", 0)) for table in tables]
    labels = [_label(table) for table in tables]
    if len(set(zip(labels, seeds, strict=True))) < len(runs):
        labels = [str(folder) for folder in folders]
    order = list(dict.fromkeys(labels))
    cells = [make_cell(label, seed, [run]) for label, seed, run in zip(labels, seeds, runs, strict=True)]
    cells.sort(key=lambda cell: (order.index(cell.method), cell.seed))
    return Comparison(", ".join(dict.fromkeys(run.name for run in runs)), tuple(cells), labels[0], target)


def settings_of(run: Run) -> dict[str, Any]:
    """The run's config.toml as tables.

    Raises:
        DataError: it is no TOML.
    """
    try:
        return tomllib.loads(run.config_text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"config.toml of {run.name} is not TOML: {error}. Restore the file from a copy.") from None


def _label(table: dict[str, Any]) -> str:
    method = table.get("method", {})
    settings = ";".join(f"{key}={value}" for key, value in sorted((method.get("settings") or {}).items()))
    name = str(method.get("name", "fedmomentum"))
    return f"{name}:{settings}" if settings else name


# ── what they say together ───────────────────────────────────────────────────────────────────────────────────────


def summarise_methods(comparison: Comparison) -> list[MethodSummary]:
    """Every method over its seeds, in the order given; see `MethodSummary`."""
    base = {cell.seed: cell for cell in comparison.cells if cell.method == comparison.baseline}
    summaries = []
    for method in comparison.methods:
        cells = [cell for cell in comparison.cells if cell.method == method]
        pairs = [(cell, base[cell.seed]) for cell in cells if cell.seed in base and method != comparison.baseline]
        reached = [point for cell in cells if (point := cell.first(comparison.target))]
        summaries.append(
            MethodSummary(
                method=method,
                seeds=tuple(cell.seed for cell in cells),
                exact_match=_over([cell.exact_match for cell in cells]),
                loss=_over([cell.loss for cell in cells]),
                best_exact_match=_over([cell.best("exact_match", max) for cell in cells]),
                best_loss=_over([cell.best("loss", min) for cell in cells]),
                exact_match_difference=_over([_minus(one.exact_match, other.exact_match) for one, other in pairs]),
                loss_difference=_over([_minus(one.loss, other.loss) for one, other in pairs]),
                reached=len(reached),
                rounds_to_target=_over([float(point.round) for point in reached]),
                bytes_to_target=_over([point.num_bytes for point in reached]),
                seconds_to_target=_over([point.seconds for point in reached]),
            )
        )
    return summaries


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _over(values: Sequence[float | None]) -> Mean | None:
    return mean_of([value for value in values if value is not None and math.isfinite(value)])


def summary_tables(comparison: Comparison) -> list[dict[str, Any]]:
    """The summary as JSON values, for comparison.json."""
    return [asdict(summary) for summary in summarise_methods(comparison)]


def cell_rows(comparison: Comparison) -> list[list[Any]]:
    """comparison.csv: its header, then a line a cell."""
    header = [
        "method", "seed", "exact_match", "loss", "items", "best_exact_match", "best_loss", "rounds",
        "bytes", "seconds", "rounds_to_target", "bytes_to_target", "seconds_to_target",
    ]  # fmt: skip
    rows: list[list[Any]] = [header]
    for cell in comparison.cells:
        last, reached = cell.points[-1], cell.first(comparison.target)
        rows.append([
            cell.method, cell.seed, cell.exact_match, cell.loss, cell.num_examples, cell.best("exact_match", max),
            cell.best("loss", min), last.round, last.num_bytes, last.seconds,
            *((reached.round, reached.num_bytes, reached.seconds) if reached else (None, None, None)),
        ])  # fmt: skip
    return rows
