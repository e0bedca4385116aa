"""Runs of Banking77's experiments that leave one line each in a table, at tuned learning rates."""

import os
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import experiment
import intents  # makes the model and registers its kind
import moments
from run_table import Row, RunTable, read_rows
from tuned_comparison import (
    TUNING_SEEDS,
    labeled,
    last_scores,
    mean_measures,
    parse_run,
    report_reproduction,
    run_all,
    search_rates,
)

from fedmomentum.config.schema import Config
from fedmomentum.config.toml import apply_overrides
from fedmomentum.errors import QuorumError
from fedmomentum.results.method_run import make_method_run
from fedmomentum.results.run_results import RunResults
from fedmomentum.utils.process import quiet_libraries

RESULTS = Path(__file__).resolve().parent / "results"
MEASURES = ("retained_energy", "update_cosine", "client_drift", "update_norm")
COLUMNS = (
    "kind",
    "method",
    "seed",
    "rate",
    "exact_match",
    "loss",
    "bytes",
    *MEASURES,
)


def main(document: str, name: str, variants: Iterable[str]) -> int:
    """Make the runs of variants with few and with many local steps that are not in the tables.

    Args:
        document: The script's docstring.
        name: The name of the tables, NAME-few.csv and NAME-many.csv.
        variants: The variants of which `--methods` can choose some.
    """
    parser = experiment.command_line(document, f"banking77-{name}")
    parser.add_argument("--only", choices=("few", "many"), help="one of the two settings")
    parser.add_argument("--methods", default=",".join(variants), help="some of them only")
    parser.add_argument("--seeds", default=",".join(map(str, moments.SEEDS)))
    parser.add_argument("--table", type=Path, default=RESULTS, help="directory of the tables")
    options = parser.parse_args()
    data = options.data.resolve()
    out = options.out.resolve()
    tables = options.table.resolve()
    methods = options.methods.split(",")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    os.chdir(RESULTS.parent)  # `intents:train` is imported from the working directory
    with quiet_libraries():
        intents.make(data, out)
        if options.reproduce:
            setting, method, seed = parse_run(options.reproduce, ("few", "many"))
            config = experiment.settings(setting, out)
            table = tables / f"{name}-{setting}.csv"
            return reproduce(config, method, seed, out, table)
        for setting in [options.only] if options.only else ["few", "many"]:
            config = experiment.settings(setting, out)
            table = tables / f"{name}-{setting}.csv"
            tune_and_score(config, methods, seeds, out / setting, table)
    return 0


def tune_and_score(
    config: Config, methods: Sequence[str], seeds: Sequence[int], out: Path, table: Path
) -> None:
    """Choose every method's learning rate, and make its runs; those in the table are not repeated.

    Args:
        config: The settings of the runs; they are evaluated after the last round only.
        methods: The methods, as `fedmomentum compare` takes them.
        seeds: The seeds of the scores.
        out: Where runs are made.
        table: The file that gets a line for each.
    """
    trials = Trials(_scored_at_the_end(config), RunTable(table, COLUMNS), out)
    for method in methods:
        rate = trials.best_rate(method)
        for seed in seeds:
            trials.run("score", method, seed, rate)


def reproduce(config: Config, method: str, seed: int, out: Path, table: Path) -> int:
    """Repeat one run of a table at its learning rate, and print its scores beside those.

    The run is in `out/reproduced`, in a directory for each table: their settings differ.

    Returns:
        0 if they are equal to the last digit, which takes a processor of the same kind.
    """
    row = committed_scores(table.stem, [seed], table.parent).get(method, {}).get(seed)
    if row is None:
        raise SystemExit(f"no committed run of {method} with seed {seed}; see {table}")
    label = labeled(method, float(row["rate"]))
    runs = out / "reproduced" / table.stem
    (directory,) = run_all(_scored_at_the_end(config), [label], [seed], runs)
    return report_reproduction(row, last_scores(directory))


def _scored_at_the_end(config: Config) -> Config:
    """Return the settings with an evaluation after the last round only."""
    return apply_overrides(config, [f"evaluation.every={config.federation.num_rounds}"])


class Trials:
    """The runs of one setting, and a line for each in its table.

    Args:
        config: The settings of the runs.
        table: Gets the lines.
        out: Where runs are made; one that is in the table is removed.
    """

    def __init__(self, config: Config, table: RunTable, out: Path) -> None:
        self._config = config
        self._table = table
        self._out = out

    def best_rate(self, method: str) -> float:
        """Return the method's learning rate by the rule of tuned_comparison.py."""

        def score_of(rate: float) -> float:
            rows = [self.run("tune", method, seed, rate) for seed in TUNING_SEEDS]
            return statistics.mean(float(row["exact_match"]) for row in rows)

        best, _ = search_rates(moments.GRID, score_of)
        return best

    def run(self, kind: str, method: str, seed: int, rate: float) -> Row:
        """Return the line of a run, which is made if it is not there."""
        key = {"kind": kind, "method": method, "seed": str(seed), "rate": f"{rate:g}"}
        return self._table.find_or_make(key, lambda: self._scores(method, seed, rate))

    def _scores(self, method: str, seed: int, rate: float) -> Row:
        """Make a run; return its scores and measures."""
        try:
            (directory,) = run_all(self._config, [labeled(method, rate)], [seed], self._out)
        except QuorumError as error:
            # No client had a usable update: weights or losses that are not finite.
            print(error, flush=True)
            return {"exact_match": "0", "loss": "inf"}
        row = measures(RunResults.load(directory))
        shutil.rmtree(directory)
        return row


def measures(run: RunResults) -> Row:
    """Return the scores after the last round, the bytes of all, and the means of the measures."""
    combined = make_method_run("", 0, [run])
    row = {
        "exact_match": repr(combined.exact_match),
        "loss": repr(combined.loss),
        "bytes": repr(combined.points[-1].num_bytes),
    }
    means = mean_measures(run.rounds, MEASURES)
    for name in MEASURES:
        row[name] = repr(means[name]) if name in means else ""
    return row


def committed_scores(
    name: str, seeds: Sequence[int], directory: Path = RESULTS
) -> dict[str, dict[int, Row]]:
    """Return the scores with the given seeds, by method and seed, of the methods that have them all.

    Args:
        name: The table, NAME.csv; it need not exist.
        seeds: The seeds; runs with other ones are left out.
        directory: The directory of the table.
    """
    file = directory / f"{name}.csv"
    found: dict[str, dict[int, Row]] = {}
    for row in read_rows(file) if file.is_file() else []:
        if row["kind"] == "score":
            found.setdefault(row["method"], {})[int(row["seed"])] = row
    complete = {}
    for method, by_seed in found.items():
        if by_seed.keys() >= set(seeds):
            complete[method] = {seed: by_seed[seed] for seed in seeds}
    return complete
