"""Compare methods at learning rates of their own, resumably: what the experiments share.

The rule for learning rates: of a grid, the one with the best mean score after the last round over
two seeds that the comparison does not use; of equally good ones the lowest. Where the best is the
lowest or highest of those tried, the grid grows on that side.
"""

import csv
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from run_table import read_rows

from fedmomentum.config.schema import Config
from fedmomentum.errors import QuorumError
from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.report import write_comparison_page
from fedmomentum.results.comparison import Comparison
from fedmomentum.run import compare
from fedmomentum.run.method_variants import parse_methods
from fedmomentum.utils.io import write_json

TUNING_SEEDS = (100, 101)
Rates = dict[str, dict[str, Any]]
"""By method: its `chosen` rate, and by rate the mean score of the tuning seeds."""


@dataclass(frozen=True)
class Grid:
    """The learning rates that are tried, and what decides between them.

    Attributes:
        rates: The whole grid, ascending.
        start: The part of it that is always tried: first index, and the one after the last.
        score: The score that decides: the highest exact match, or the lowest loss.
    """

    rates: tuple[float, ...]
    start: tuple[int, int]
    score: Literal["exact_match", "loss"] = "exact_match"


def labeled(method: str, rate: float) -> str:
    """Return the method at a learning rate, as `fedmomentum compare` takes it."""
    return f"{method}{';' if ':' in method else ':'}training.learning-rate={rate:g}"


def method_of(label: str) -> str:
    """Return the label of a run without its learning rate."""
    return label.partition("training.learning-rate=")[0].rstrip(":;")


def choose_rates(
    config: Config, methods: Sequence[str], grid: Grid, out: Path, file: Path
) -> Rates:
    """Choose every method's learning rate; what is in `file` already is not chosen again.

    Args:
        config: The settings of the runs.
        methods: The methods.
        grid: The grid.
        out: The directory of the runs.
        file: Where the rates are written, method by method.
    """
    rates: Rates = json.loads(file.read_text()) if file.is_file() else {}
    for method in methods:
        if method not in rates:
            rates[method] = choose_rate(config, method, grid, out)
            write_json(file, rates)
    return rates


def choose_rate(config: Config, method: str, grid: Grid, out: Path) -> dict[str, Any]:
    """Return the method's learning rate by the rule, and every score it was chosen from."""

    def score_of(rate: float) -> float:
        label = labeled(method, rate)
        score = _tuning_score(config, label, grid, out)
        print(f"{out.name} {label}: {score:.4f}", flush=True)
        return score

    best, scores = search_rates(grid, score_of)
    return {
        "chosen": best,
        grid.score: {f"{rate:g}": scores[rate] for rate in sorted(scores)},
    }


def search_rates(
    grid: Grid, score_of: Callable[[float], float]
) -> tuple[float, dict[float, float]]:
    """Return the best rate of a grid by the rule, and the scores of those that were tried."""
    first, end = grid.start
    scores: dict[float, float] = {}
    sign = -1 if grid.score == "loss" else 1
    while True:
        for rate in grid.rates[first:end]:
            if rate not in scores:
                scores[rate] = score_of(rate)
        best = max(scores, key=lambda rate: (sign * scores[rate], -rate))
        if best == grid.rates[first] and first > 0:
            first -= 1
        elif best == grid.rates[end - 1] and end < len(grid.rates):
            end += 1
        else:
            return best, scores


def _tuning_score(config: Config, label: str, grid: Grid, out: Path) -> float:
    """Return the mean score over the tuning seeds; the worst there is where training diverged."""
    worst = math.inf if grid.score == "loss" else 0.0
    try:
        folders = run_all(config, [label], TUNING_SEEDS, out)
    except QuorumError as error:
        # No client had a usable update: weights or losses that are not finite.
        print(f"{out.name} {label}: {error}", flush=True)
        return worst
    score = statistics.mean(last_scores(folder)[grid.score] for folder in folders)
    return score if math.isfinite(score) else worst


def run_all(config: Config, labels: Sequence[str], seeds: Sequence[int], out: Path) -> list[Path]:
    """Make the runs that do not exist yet; return the folders of all."""
    planned_runs = _planned(config, labels, seeds, out)
    compare.start_comparison(config, out)
    for run in planned_runs:
        if not run.is_finished():
            compare.execute_run(run)
            scores = last_scores(run.directory)
            print(
                f"{out.name} {run.title}: exact match {scores['exact_match']:.4f}, "
                f"loss {scores['loss']:.4f}",
                flush=True,
            )
    return [run.directory for run in planned_runs]


def _planned(
    config: Config, labels: Sequence[str], seeds: Sequence[int], out: Path
) -> list[compare.PlannedRun]:
    variants = parse_methods(",".join(labels), config)
    return compare.plan_runs(config, variants, seeds, out)


def last_scores(folder: Path) -> dict[str, float]:
    """Return the scores over all held-out examples after the last round."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    scores: dict[str, float] = last["evaluation"]["total"]
    return scores


def report_reproduction(
    committed: Mapping[str, str],
    found: Mapping[str, float],
    names: Sequence[str] = ("exact_match", "loss"),
) -> int:
    """Print the scores of a committed run beside those of its repetition.

    Args:
        committed: The line of the committed run.
        found: The scores of the repetition.
        names: The scores to compare.

    Returns:
        0 if they are equal to the last digit, which takes a processor of the same kind.
    """
    for name in names:
        print(f"{name}: committed {committed[name]}, here {found[name]!r}")
    if all(float(committed[name]) == found[name] for name in names):
        return 0
    print(
        "Another kind of processor computes other last bits, which training makes larger; to "
        "judge a change of the code, compare both versions on one machine"
    )
    return 1


def parse_run(text: str, settings: Iterable[str] = ()) -> tuple[str, str, int]:
    """Return setting, method and seed of `SETTING:METHOD:SEED`.

    Args:
        text: What the command line has.
        settings: The settings that exist; empty if any is allowed.
    """
    known = list(settings)
    setting, _, rest = text.partition(":")
    method, _, seed = rest.rpartition(":")
    if not method or not seed.isdecimal():
        raise SystemExit(f"a run is named SETTING:METHOD:SEED; got {text}")
    if known and setting not in known:
        raise SystemExit(f"no setting {setting}; there are {', '.join(known)}")
    return setting, method, int(seed)


def reproduce(config: Config, method: str, seed: int, out: Path, file: Path) -> int:
    """Repeat one run of a committed comparison, and print its scores beside the committed ones.

    Args:
        config: The settings of the comparison.
        method: The method, without its learning rate.
        seed: The seed.
        out: The directory of the repeated run.
        file: The committed comparison.csv.

    Returns:
        0 if the scores are equal to the last digit, which takes a processor of the same kind.
    """
    rows = read_rows(file) if file.is_file() else []
    for row in rows:
        if method_of(row["method"]) == method and row["seed"] == str(seed):
            (directory,) = run_all(config, [row["method"]], [seed], out)
            return report_reproduction(row, last_scores(directory))
    raise SystemExit(
        f"no committed run of {method} with seed {seed}; the methods and seeds are in {file}"
    )


def mean_measures(rounds: Sequence[RoundRecord], names: Sequence[str]) -> dict[str, float]:
    """Return the mean over the rounds of each measure; one that no round has is left out.

    Args:
        rounds: The records of a run.
        names: `retained_energy`, or fields of the diagnostics.
    """
    means = {}
    for name in names:
        values = []
        for record in rounds:
            source = record if name == "retained_energy" else record.diagnostics
            value = getattr(source, name, None)
            if value is not None:
                values.append(value)
        if values:
            means[name] = statistics.mean(values)
    return means


def compare_at(
    config: Config,
    rates: Rates,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    baseline: str,
    target: float,
    command: str,
) -> Comparison:
    """Compare the methods at their rates, as `fedmomentum compare` does.

    Args:
        config: The settings of the runs.
        rates: The methods' learning rates.
        methods: The methods.
        seeds: The seeds of the comparison.
        out: The directory of the comparison.
        baseline: The method that the others are compared with.
        target: The exact match to which bytes and rounds are counted.
        command: What makes the comparison, for its page.

    Returns:
        The comparison, as written to `out`.
    """
    labels = {method: labeled(method, rates[method]["chosen"]) for method in methods}
    run_all(config, list(labels.values()), seeds, out)
    comparison = compare.write_comparison(
        out,
        _planned(config, list(labels.values()), seeds, out),
        baseline=labels[baseline],
        target=target,
        command=command,
    )
    write_comparison_page([out])
    return comparison


def publish(out: Path, rates: Rates, results: Path) -> None:
    """Copy what is kept with the code: scores, learning rates, the page's data."""
    shutil.rmtree(results, ignore_errors=True)
    shutil.copytree(out / "comparison-data", results / "comparison-data")
    for copied in ("comparison.csv", "comparison.json"):
        shutil.copy(out / copied, results / copied)
    (score,) = {key for row in rates.values() for key in row} - {"chosen"}
    with (results / "learning-rates.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "learning_rate", f"mean_{score}_of_tuning_seeds", "chosen"])
        for method, row in rates.items():
            for rate, value in row[score].items():
                table.writerow([method, rate, value, int(float(rate) == row["chosen"])])
