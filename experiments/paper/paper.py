"""The published setting of FedMomentum, for a user with the GPU and the weights.

    python experiments/paper/paper.py --data DATA_DIRECTORY --model LLAMA_2_7B_DIRECTORY
    [section.key=value ...]

Makes the data files, prints what the runs will take, makes the runs, prints the tables. Stopped and
started again, it continues with the run that it was in. What of the setting is known, what is not,
and where the data comes from: README.md.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import task_files
import tuned_comparison
from tuned_comparison import Grid, Rates

from fedmomentum.cli.tables import comparison_tables, plan_table
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import load_config
from fedmomentum.data.tokenized import TokenizedClient
from fedmomentum.formats.plan import Plan
from fedmomentum.results.formatting import count, human_seconds
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.utils.process import quiet_libraries
from fedmomentum.utils.terminal import SafeConsole

PUBLISHED = "fedmomentum:split=balanced"
METHODS = (PUBLISHED, "fedit", "flora", "ffalora", "frlora")
"""The paper's methods."""
MORE_METHODS = (
    "fedexlora",
    "fedmomentum:split=balanced;training.optimizer-state=shared",
    "fedexlora:training.optimizer-state=shared",
)
GRID = Grid(
    rates=(1e-5, 3e-5, 1e-4, 1.7e-4, 3e-4, 5.2e-4, 1e-3, 1.7e-3, 3e-3, 1e-2),
    start=(3, 6),
    score="loss",
)
TARGET = 0.3
"""The exact match to which bytes and rounds are counted."""
PASSES_OF_A_STEP = 2
"""A training step costs a forward and a backward pass; the weights themselves have no gradient."""


@dataclass(frozen=True)
class Job:
    """One task: its settings, and what one run of it is.

    Attributes:
        name: `maths`, `commonsense` or `code`.
        config: The settings of all its runs.
        plan: The package's estimate for a run of FedMomentum, which takes the most.
        num_steps: Optimizer steps of a run, all clients together.
        num_tokens: Tokens that a run trains on.
        num_evaluated: Tokens that a run is evaluated on.
    """

    name: str
    config: Config
    plan: Plan
    num_steps: int
    num_tokens: float
    num_evaluated: float

    def hours(self, tflops: float) -> float:
        """Return the hours of a run at so many useful TFLOP/s: two a parameter, token and pass."""
        passes = PASSES_OF_A_STEP * self.num_tokens + self.num_evaluated
        return 2 * self.plan.num_parameters * passes / (tflops * 1e12) / 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets")
    parser.add_argument("--model", required=True, help="directory of LLaMA-2-7B, or of another")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--only", choices=tuple(task_files.SETS), help="one of the three tasks")
    parser.add_argument("--seeds", default="0", help="separated by commas [default: 0]")
    parser.add_argument("--more", action="store_true", help="FedEx-LoRA and shared moments, too")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose each method's learning rate; without it, all have that of the TOML file",
    )
    parser.add_argument("--plan", action="store_true", help="print what it would take, and stop")
    parser.add_argument(
        "--tflops",
        type=float,
        default=100.0,
        help="useful TFLOP/s that the hours are planned with [default: 100]",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)

    methods = METHODS + (MORE_METHODS if options.more else ())
    seeds = [int(seed) for seed in options.seeds.split(",")]
    console = SafeConsole(highlight=False)
    with quiet_libraries():
        jobs = []
        for name in [options.only] if options.only else list(task_files.SETS):
            if make_files(name, options.data, options.out):
                jobs.append(plan_job(name, options.model, options.out, options.overrides))
        if not jobs:
            print(f"{options.data} has the data of none of the tasks; README.md says what it wants")
            return 2
        num_runs = len(methods) * len(seeds)
        if options.tune:
            # Three rates at least; more where the best is at an end.
            num_runs += len(methods) * 3 * len(tuned_comparison.TUNING_SEEDS)
        show_plan(jobs, num_runs, options.tflops, options.out, console)
        if options.plan:
            return 0
        for job in jobs:
            run_job(job, methods, seeds, options.out, console, tune=options.tune)
    return 0


def make_files(name: str, data: Path, out: Path) -> bool:
    """Write the data files of a task; say what is missing. Return whether there is any data."""
    found, missing = task_files.present(name, data)
    if missing:
        print(f"{name}: {', '.join(missing)} missing in {data}; used: {', '.join(found) or 'none'}")
    if not found:
        return False
    for split in ("train", "test"):
        rows = task_files.read_task(name, data, split)
        task_files.write_rows(rows, out / f"{name}-{split}.jsonl")
    return True


def plan_job(name: str, model: str, out: Path, overrides: Sequence[str]) -> Job:
    """Return a task with what one of its runs will take."""
    config = load_config(
        HERE / f"{name}.toml",
        [
            f"model.name={model}",
            f"data.source={out.resolve() / f'{name}-train.jsonl'}",
            f"data.test-source={out.resolve() / f'{name}-test.jsonl'}",
            *overrides,
        ],
    )
    plan, clients = FederatedTrainer(config, out / f"{name}-plan").plan()
    rounds = config.federation.num_rounds
    steps = [_num_steps(config, len(client.train)) for client in clients]
    batch = config.training.batch_size
    tokens = [
        num_steps * batch * _mean_length(client.train.input_ids)
        for num_steps, client in zip(steps, clients, strict=True)
    ]
    return Job(
        name,
        config,
        plan,
        num_steps=rounds * sum(steps),
        num_tokens=rounds * sum(tokens),
        num_evaluated=_num_evaluated(config, clients),
    )


def _num_steps(config: Config, num_examples: int) -> int:
    """Return a client's optimizer steps in a round."""
    if config.training.local_epochs:
        batches = -(-num_examples // config.training.batch_size)
        return max(1, round(config.training.local_epochs * batches))
    return config.training.local_steps or 10


def _mean_length(rows: Sequence[Sequence[int]]) -> float:
    return statistics.mean(map(len, rows)) if rows else 0.0


def _num_evaluated(config: Config, clients: Sequence[TokenizedClient]) -> float:
    """Return the tokens of a run's evaluations: before it, after it, and in between."""
    evaluation = config.evaluation
    num_between = (config.federation.num_rounds - 1) // evaluation.every
    total = 0.0
    for client in clients:
        last = min(len(client.test), evaluation.final_num_examples)
        between = min(len(client.test), evaluation.num_examples)
        length = _mean_length(client.test.input_ids)
        total += (2 * last + num_between * between) * length
    return total


def show_plan(
    jobs: Sequence[Job], num_runs: int, tflops: float, out: Path, console: SafeConsole
) -> None:
    """Print what a run of each task, and everything, will take."""
    hours = 0.0
    for job in jobs:
        console.print(f"\n[bold]{job.name}[/]: one of {num_runs} runs")
        console.print(plan_table(job.plan, out / job.name))
        for warning in job.plan.warnings:
            console.print(f"note: {warning}", markup=False)
        one = job.hours(tflops)
        hours += num_runs * one
        console.print(
            f"{job.num_steps} optimizer steps on {count(round(job.num_tokens))} tokens, "
            f"{count(round(job.num_evaluated))} tokens to evaluate: about "
            f"{human_seconds(3600 * one)} a run at {tflops:g} useful TFLOP/s"
        )
    console.print(
        f"\n{num_runs * len(jobs)} runs, about {hours:.1f} hours in all, an estimate: divide by "
        "what your device does in fact (--tflops). Runs that are finished already count too.\n"
    )


def run_job(
    job: Job,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    console: SafeConsole,
    *,
    tune: bool,
) -> None:
    """Make the runs of a task and print its tables."""
    rates: Rates = {
        method: {"chosen": job.config.training.learning_rate, "loss": {}} for method in methods
    }
    if tune:
        rates = tuned_comparison.choose_rates(
            job.config,
            methods,
            GRID,
            out / f"{job.name}-tuning",
            out / f"{job.name}-learning-rates.json",
        )
    comparison = tuned_comparison.compare_at(
        job.config,
        rates,
        methods,
        seeds,
        out / job.name,
        baseline=PUBLISHED,
        target=TARGET,
        command=f"python experiments/paper/paper.py --only {job.name} ...",
    )
    console.print(f"\n[bold]{job.name}[/]")
    for table in comparison_tables(comparison):
        console.print(table)
    console.print(f"The page is {out / job.name / 'comparison.html'}\n", markup=False)


if __name__ == "__main__":
    sys.exit(main())
