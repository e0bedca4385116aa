"""What a client costs besides training: merging a residual, loading the base, starting, a job.

    python benchmarks/client.py [--only merge load job start] [--threads 2] [--cpu-time] [--json
    FILE]

merge: `Float32Weights.apply` of one factored residual against the machine's floor, the larger of
memory traffic and matrix product. load: the bundled model, then again in the same process. job:
the default configuration, evaluated on fewer examples; everything except the trainer's steps and
the evaluations counts as overhead. start: commands in new processes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import CONFIG, Clock, Target, alternate, finish, medians
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Trainer

from fedmomentum import LowRank
from fedmomentum.aggregation.aggregate import aggregate_updates
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.client.local_model import LocalModel
from fedmomentum.client.store import ClientStore
from fedmomentum.config.toml import load_config
from fedmomentum.evaluation.teacher_forcing import evaluate
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.protocol.codec import decode_reply, decode_task, encode_reply, encode_task
from fedmomentum.run.client_examples import tokenize_clients
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.run.method import make_method
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.client_deltas import distance
from fedmomentum.server.client_updates import UpdateReader
from fedmomentum.server.diagnostics import round_diagnostics
from fedmomentum.server.scoring import expected_probes
from fedmomentum.server.update_store import UpdateStore
from fedmomentum.training.trainer import train
from fedmomentum.utils.process import quiet_libraries
from fedmomentum.utils.tensors import safetensors_bytes

SHAPES = [(4096, 4096, 150), (4096, 4096, 24), (576, 576, 24)]
CONSOLE = Console()


# ── merging a residual ──


class RepeatedMerge:
    """Merges one more copy of a residual into a base weight at every call.

    Args:
        weights: The base weights.
        residual: What is merged.
    """

    def __init__(self, weights: Float32Weights, residual: StoredObject) -> None:
        self._weights = weights
        self._residual = residual
        self._num_merged = 0

    def __call__(self) -> None:
        """Merge one more copy."""
        self._num_merged += 1
        self._weights.apply([self._residual] * self._num_merged)


def merge(repeats: int, clock: Clock) -> tuple[list[dict[str, Any]], list[Target]]:
    """Time adding `B A` to a float32 weight `(out, in)`: in place, and through `B A`.

    The floor is the larger of the time to read and write the weight once, and that of so many
    operations in a square matrix product; both are measured in turn with the sides.
    """
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    square = torch.rand(1024, 1024)
    product = torch.empty(1024, 1024)
    for out_size, in_size, rank in SHAPES:
        weights, layer = _base_layer(out_size, in_size)
        factors = LowRank(torch.randn(out_size, rank) * 1e-4, torch.randn(rank, in_size))
        residual = StoredObject.of({"layer": factors})
        _ = residual.name, residual.matrices  # parsed and hashed once, before the clock starts
        sides: dict[str, Callable[[], Any]] = {
            "in place": RepeatedMerge(weights, residual),
            "through B A": partial(_merge_dense, layer, factors),
        }
        peaks = {name: _peak_mb(side) for name, side in sides.items()}
        sides["copy"] = partial(torch.empty_like(layer.weight.data).copy_, layer.weight.data)
        sides["product"] = partial(torch.mm, square, square, out=product)
        seconds = medians(alternate(sides, repeats, clock=clock))
        size = out_size * in_size
        floor = max(seconds["copy"], seconds["product"] * size * rank / 1024**3)
        shape = f"{out_size} x {in_size}"
        rows.append({"shape": shape, "rank": rank, "floor": floor, **seconds, "peak_mb": peaks})
        if size > 2**20:  # below, a call's own cost is the floor
            name = f"merging rank {rank} into {shape}, times the floor"
            targets.append(Target.at_most(name, 2, seconds["in place"] / floor))
    _print_merges(rows)
    return rows, targets


def _base_layer(out_size: int, in_size: int) -> tuple[Float32Weights, nn.Linear]:
    """Return a linear layer as the base weights of a client, and the layer."""
    layer = nn.Linear(in_size, out_size, bias=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(safetensors_bytes({"layer.weight": layer.weight.detach()}))
        return Float32Weights({"layer": layer}, Path(folder)), layer


def _merge_dense(layer: nn.Linear, factors: LowRank) -> Tensor:
    return layer.weight.data.add_(factors.B @ factors.A)


def _print_merges(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "weight",
        "rank",
        "floor ms",
        "in place ms",
        "through B A ms",
        "peak MB, in place",
        "through B A",
    )
    for row in rows:
        numbers = [f"{1000 * row[key]:.2f}" for key in ("floor", "in place", "through B A")]
        peaks = [f"{peak:.0f}" for peak in row["peak_mb"].values()]
        table.add_row(row["shape"], str(row["rank"]), *numbers, *peaks)
    CONSOLE.print(table)


def _peak_mb(side: Callable[[], Any]) -> float:
    """Return the MB by which the process grows while `side` runs, at most; NaN except on Linux."""
    side()  # threads and buffers of the libraries, once
    status = Path("/proc/self/status")
    if not status.is_file():
        return math.nan
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    side()
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return (int(sizes["VmHWM"].split()[0]) - int(sizes["VmRSS"].split()[0])) / 1024


# ── loading the base ──


def load(repeats: int, clock: Clock) -> tuple[dict[str, Any], list[Target]]:
    """Time loading the configuration's base model in this process, first and again."""
    config = load_config(CONFIG)
    times = []
    for _ in range(repeats + 1):
        started = clock()
        with quiet_libraries():
            local = LocalModel(config.model, config.lora, seed=0)
        times.append(clock() - started)
    started = clock()
    local.base_weights.reset()
    reset = clock() - started
    CONSOLE.print(
        f"base load: first {times[0]:.2f} s, then {' '.join(f'{t:.2f}' for t in times[1:])} s; "
        f"adapted weights again from the folder: {reset:.3f} s"
    )
    target = Target.at_most("a later base load, s", 3, statistics.median(times[1:]))
    return {"load": times, "reset": reset}, [target]


# ── where the time of a job goes ──


class Stopwatch:
    """Seconds spent in watched functions by purpose; nested calls are counted separately.

    Args:
        clock: Returns seconds.

    Attributes:
        seconds: Purpose to seconds.
        num_calls: Watched function to the number of its calls.
    """

    def __init__(self, clock: Clock) -> None:
        self.seconds: dict[str, float] = {}
        self.num_calls: dict[str, int] = {}
        self._clock = clock
        # For each call in progress, and for none: the seconds of the watched calls within it.
        self._nested = [0.0]

    @contextmanager
    def watch(self, purpose: str, function: Callable[..., Any]) -> Iterator[None]:
        """Count the calls of a function for a purpose, wherever the package refers to it.

        Raises:
            LookupError: If nothing in the package refers to it.
        """
        owners = _owners(function)
        if not owners:
            raise LookupError(f"no module or class of the package has {function.__qualname__}")
        self.num_calls[function.__qualname__] = 0
        timed = self._timed(purpose, function)
        for owner in owners:
            setattr(owner, function.__name__, timed)
        try:
            yield
        finally:
            for owner in owners:
                setattr(owner, function.__name__, function)

    def _timed(self, purpose: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.num_calls[function.__qualname__] += 1
            self._nested.append(0.0)
            started = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                took = self._clock() - started
                own = took - self._nested.pop()
                self.seconds[purpose] = self.seconds.get(purpose, 0.0) + own
                self._nested[-1] += took

        return timed


def _owners(function: Callable[..., Any]) -> list[ModuleType | type]:
    """Return the modules of the package, and the classes in them, that refer to a function."""
    owners: dict[int, ModuleType | type] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "fedmomentum":
            continue
        candidates: list[ModuleType | type] = [module]
        candidates += [value for value in vars(module).values() if isinstance(value, type)]
        for owner in candidates:
            if vars(owner).get(function.__name__) is function:
                owners[id(owner)] = owner
    return list(owners.values())


STEPS = "training steps"
EVALUATING = "evaluating"
TOKENIZING = "tokenizing"
OVERHEAD = "all that is not training"
WATCHED: Mapping[str, list[Callable[..., Any]]] = {
    STEPS: [Trainer._run_epoch],
    EVALUATING: [evaluate],
    TOKENIZING: [tokenize_clients],
    "loading the global model": [ClientStore.receive, LocalModel.load_global_model],
    "probes": [LocalModel.probes, LocalModel.applied_fraction, expected_probes],
    "starting and ending the trainer": [train],
    "the adapter out of the model": [LocalModel.adapter],
    "tasks and replies as bytes": [encode_task, decode_task, encode_reply, decode_reply],
    "checking and spooling updates": [UpdateReader.read, distance, UpdateStore.put],
    "aggregating": [aggregate_updates, GlobalModel.advance],
    "diagnostics": [round_diagnostics],
    "checkpoints": [RunDirectory.commit],
    "the rest": [FederatedTrainer.train],
}
"""What the time of a job is for, and the functions that take it."""


def job(out: Path, threads: int, clock: Clock) -> tuple[dict[str, float], list[Target]]:
    """Measure where the time of the default job goes, except model load and evaluation.

    Raises:
        LookupError: If a watched function was not called: then the table would be wrong.
    """
    config = load_config(
        CONFIG,
        [f"run.threads={threads}", "evaluation.num-examples=4", "evaluation.final-num-examples=4"],
    )
    stopwatch = Stopwatch(clock)
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        for purpose, functions in WATCHED.items():
            for function in functions:
                stack.enter_context(stopwatch.watch(purpose, function))
        trainer = FederatedTrainer(config, out)
        trainer.prepare()
        # All else that was watched until here belongs to the model's load.
        stopwatch.seconds = {TOKENIZING: stopwatch.seconds[TOKENIZING]}
        trainer.train()
    never_called = [name for name, count in stopwatch.num_calls.items() if not count]
    if never_called:
        raise LookupError(f"the job never called {', '.join(never_called)}; see WATCHED")

    spent = {purpose: stopwatch.seconds[purpose] for purpose in WATCHED if purpose != EVALUATING}
    total = sum(spent.values())
    spent[OVERHEAD] = total - spent[STEPS]
    table = Table("of a job without model load and evaluation", "s", "%")
    for purpose, seconds in spent.items():
        table.add_row(purpose, f"{seconds:.2f}", f"{100 * seconds / total:.1f}")
    CONSOLE.print(table)
    share = 100 * spent[OVERHEAD] / total
    return spent, [Target.at_most("share of a job that is not training, %", 5, share)]


# ── starting ──


def start(folder: Path, repeats: int) -> tuple[dict[str, list[float]], list[Target]]:
    """Time commands in new processes, in wall time.

    Args:
        folder: A global model or a run, for `fedmomentum inspect`.
        repeats: How many times each.
    """
    sides = {
        "--help": _command("-m", "fedmomentum", "--help"),
        "inspect": _command("-m", "fedmomentum", "inspect", str(folder)),
        "import torch alone": _command("-c", "import torch"),
    }
    seconds = alternate(sides, repeats)
    table = Table("command", "median s", "all")
    for name, times in seconds.items():
        table.add_row(name, f"{statistics.median(times):.2f}", " ".join(f"{t:.2f}" for t in times))
    CONSOLE.print(table)
    middle = medians(seconds)
    ratio = middle["inspect"] / middle["import torch alone"]
    return seconds, [
        Target.at_most("fedmomentum --help, s", 1.5, middle["--help"]),
        Target.at_most("fedmomentum inspect, s", 1.5, middle["inspect"]),
        Target.at_most("fedmomentum inspect, times `import torch`", 1.5, ratio),
    ]


def _command(*arguments: str) -> Callable[[], Any]:
    """Return a function that runs Python with these arguments, its output dropped."""
    return partial(
        subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL
    )


PARTS = ("merge", "load", "job", "start")


def main() -> None:
    """Run the parts that are asked for, and print their tables and targets."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of wall time, on a busy machine; not for start",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock: Clock = time.process_time if options.cpu_time else time.perf_counter
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)
    measured: dict[str, Any] = {}
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        if "merge" in options.only:
            measured["merge"], more = merge(2 * options.repeats, clock)
            targets += more
        if "load" in options.only:
            measured["load"], more = load(min(3, options.repeats), clock)
            targets += more
        if "job" in options.only:
            model = Path(name) / "run"
            measured["job"], more = job(model, options.threads, clock)
            targets += more
        if "start" in options.only:
            if not model.exists():
                config = load_config(CONFIG)
                with quiet_libraries():
                    local = LocalModel(config.model, config.lora, seed=0)
                local.initial_global_model(make_method(config)).save(model)
            measured["start"], more = start(model, options.repeats)
            targets += more
    finish(targets, options.json, CONSOLE, "transformers", "peft", **measured)


if __name__ == "__main__":
    main()
