"""What a client costs besides training: merging a residual, loading the base, starting, a job.

    python benchmarks/client.py [--only merge load job start] [--threads 2] [--cpu-time] [--json
    FILE]

merge: `Float32Weights.apply` of one factored residual against the machine's floor, the larger of
memory traffic and matrix product. load: the embedded model, again in the same process. job: the configuration's run,
evaluated on less; everything but the trainer's steps and the evaluations counts as overhead. start:
commands in new processes.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from common import CONFIG, Target, alternate, finish, medians
from rich.console import Console
from rich.table import Table
from torch import nn

from fedmomentum import LowRank
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.client import client as client_module
from fedmomentum.client import work as work_module
from fedmomentum.client.local_model import LocalModel
from fedmomentum.client.store import ClientStore
from fedmomentum.config.toml import load_config
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.run import setup as setup_module
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.server import exchange as exchange_module
from fedmomentum.server import screening as screening_module
from fedmomentum.server import server as server_module
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.client_updates import UpdateReader
from fedmomentum.server.update_store import UpdateStore
from fedmomentum.training.hf_trainer import CompletionTrainer
from fedmomentum.utils.process import quiet_libraries
from fedmomentum.utils.tensors import safetensors_bytes

SHAPES = [(4096, 4096, 150), (4096, 4096, 24), (576, 576, 24)]
CONSOLE = Console()


def merge(repeats: int) -> tuple[list[dict[str, Any]], list[Target]]:
    """Seconds to add `B A` to a float32 weight `(out, in)`: in place, and through `B A`.

    The floor is the larger of the time to read and write the weight once, and that of so many
    operations in a square matrix product; both are measured in turn with the sides.
    """
    rows, targets = [], []
    square, product = torch.rand(1024, 1024), torch.empty(1024, 1024)
    for out_size, in_size, rank in SHAPES:
        held, layer, blob = _held(out_size, in_size, rank)
        count, matrix = [0], blob.matrices["layer"]

        def in_place(
            held: Float32Weights = held, blob: StoredObject = blob, count: list[int] = count
        ) -> None:
            count[0] += 1
            held.apply([blob] * count[0])

        def dense(layer: nn.Linear = layer, matrix: LowRank = matrix) -> None:
            layer.weight.data.add_(matrix.B @ matrix.A)

        grown = {
            name: _peak_mb(side) for name, side in (("in place", in_place), ("through B A", dense))
        }
        size, other = out_size * in_size, torch.empty_like(layer.weight)

        def copy(layer: nn.Linear = layer, other: torch.Tensor = other) -> None:
            other.copy_(layer.weight.data)

        sides = {
            "in place": in_place,
            "through B A": dense,
            "copy": copy,
            "product": lambda: torch.mm(square, square, out=product),
        }
        seconds = medians(alternate(sides, repeats))
        floor = max(seconds["copy"], seconds["product"] * size * rank / 1024**3)
        rows.append(
            {
                "shape": f"{out_size} x {in_size}",
                "rank": rank,
                "floor": floor,
                **seconds,
                "peak_mb": grown,
            }
        )
        if size > 2**20:  # below, a call's own cost is the floor
            name = f"merging rank {rank} into {out_size} x {in_size}, times the floor"
            targets.append(Target.at_most(name, 2, seconds["in place"] / floor))
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
        table.add_row(
            row["shape"],
            str(row["rank"]),
            *numbers,
            *(f"{mb:.0f}" for mb in row["peak_mb"].values()),
        )
    CONSOLE.print(table)
    return rows, targets


def _peak_mb(side: Callable[[], Any]) -> float:
    """MB by which the process grows while `side` runs, at most; Linux only, else NaN."""
    side()  # threads and buffers of the libraries, once
    status = Path("/proc/self/status")
    if not status.is_file():
        return math.nan
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    side()
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return (int(sizes["VmHWM"].split()[0]) - int(sizes["VmRSS"].split()[0])) / 1024


def _held(out_size: int, in_size: int, rank: int) -> tuple[Float32Weights, nn.Linear, StoredObject]:
    with tempfile.TemporaryDirectory() as folder:
        layer = nn.Linear(in_size, out_size, bias=False)
        (Path(folder) / "model.safetensors").write_bytes(
            safetensors_bytes({"layer.weight": layer.weight.detach()})
        )
        held = Float32Weights({"layer": layer}, Path(folder))
    blob = StoredObject.of(
        {"layer": LowRank(torch.randn(out_size, rank) * 1e-4, torch.randn(rank, in_size))}
    )
    _ = blob.name, blob.matrices
    return held, layer, blob


def load(repeats: int) -> tuple[dict[str, Any], list[Target]]:
    """Seconds to load the configuration's base model in this process, first and again."""
    config = load_config(CONFIG)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with quiet_libraries():
            local = LocalModel(config.model, config.lora, seed=0)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    local.base_weights.reset()
    again = time.perf_counter() - started
    CONSOLE.print(
        f"base load: first {times[0]:.2f} s, then {' '.join(f'{t:.2f}' for t in times[1:])} s; "
        f"adapted weights anew from the folder: {again:.3f} s"
    )
    return {"load": times, "pristine": again}, [
        Target.at_most("a later base load, s", 3, statistics.median(times[1:]))
    ]


class Clock:
    """Seconds spent in watched functions by purpose; nested calls are counted separately."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [
            0.0
        ]  # of each call under way, and of none: what watched calls within it took

    @contextmanager
    def watch(self, what: str, owner: Any, name: str) -> Iterator[None]:
        """Add up what calls of `owner.name` take, for a while."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self.seconds[what] = self.seconds.get(what, 0.0) + took - self._inner.pop()
                self._inner[-1] += took

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)


WATCHED = {
    "training steps": [(CompletionTrainer, "_run_epoch")],
    "evaluating": [(work_module, "evaluate")],
    "tokenising": [(setup_module, "tokenized_clients")],
    "loading the global model": [
        (ClientStore, "receive"),
        (LocalModel, "load_global_model"),
    ],
    "probes": [
        (LocalModel, "probes"),
        (LocalModel, "applied_fraction"),
        (server_module, "expected_probes"),
    ],
    "starting and ending the trainer": [(setup_module, "train")],
    "the adapter out of the model": [(LocalModel, "adapter")],
    "tasks and replies as bytes": [
        (exchange_module, "encode_task"),
        (client_module, "decode_task"),
        (client_module, "encode_reply"),
        (exchange_module, "decode_reply"),
    ],
    "checking and spooling updates": [
        (UpdateReader, "read"),
        (screening_module, "distance"),
        (UpdateStore, "put"),
    ],
    "aggregating": [(server_module, "aggregate_updates"), (GlobalModel, "advance")],
    "diagnostics": [(server_module, "round_diagnostics")],
    "checkpoints": [(RunDirectory, "commit")],
    "the rest": [(FederatedTrainer, "train")],
}
"""What the time of a job is for, and the functions that take it."""


def job(out: Path, threads: int) -> tuple[dict[str, float], list[Target]]:
    """Where the wall time of the default job goes, model load and evaluation aside."""
    config = load_config(
        CONFIG,
        [f"run.threads={threads}", "evaluation.num-examples=4", "evaluation.final-num-examples=4"],
    )
    clock = Clock()
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        for what, functions in WATCHED.items():
            for owner, name in functions:
                stack.enter_context(clock.watch(what, owner, name))
        trainer = FederatedTrainer(config, out)
        trainer.prepare()
        clock.seconds = {
            "tokenising": clock.seconds["tokenising"]
        }  # what else is watched was the model's load
        trainer.train()
    spent = {what: clock.seconds[what] for what in WATCHED if what != "evaluating"}
    whole = sum(spent.values())
    spent["all that is not training"] = whole - spent["training steps"]
    table = Table("of a job without model load and evaluation", "s", "%")
    for what, seconds in spent.items():
        table.add_row(what, f"{seconds:.2f}", f"{100 * seconds / whole:.1f}")
    CONSOLE.print(table)
    share = 100 * spent["all that is not training"] / whole
    return spent, [Target.at_most("share of a job that is not training, %", 5, share)]


def start(folder: Path, repeats: int) -> tuple[dict[str, list[float]], list[Target]]:
    """Seconds of commands in new processes."""

    def command(*arguments: str) -> Callable[[], Any]:
        return lambda: subprocess.run(
            [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL
        )

    sides = {
        "--help": command("-m", "fedmomentum", "--help"),
        "inspect": command("-m", "fedmomentum", "inspect", str(folder)),
        "import torch alone": command("-c", "import torch"),
    }
    seconds = alternate(sides, repeats)
    table = Table("command", "median s", "all")
    for name, times in seconds.items():
        table.add_row(name, f"{statistics.median(times):.2f}", " ".join(f"{t:.2f}" for t in times))
    CONSOLE.print(table)
    found = medians(seconds)
    return seconds, [
        Target.at_most("fedmomentum --help, s", 1.5, found["--help"]),
        Target.at_most("fedmomentum inspect, s", 1.5, found["inspect"]),
        Target.at_most(
            "fedmomentum inspect, times `import torch`",
            1.5,
            found["inspect"] / found["import torch alone"],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["merge", "load", "job", "start"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time; for merge and job on a busy machine",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        time.perf_counter = time.process_time  # what every clock here reads, ours and the run's own
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)
    measured: dict[str, Any] = {}
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        if "merge" in options.only:
            measured["merge"], more = merge(2 * options.repeats)
            targets += more
        if "load" in options.only:
            measured["load"], more = load(min(3, options.repeats))
            targets += more
        if "job" in options.only:
            model = folder / "run"
            measured["job"], more = job(model, options.threads)
            targets += more
        if "start" in options.only:
            if not model.exists():
                config = load_config(CONFIG)
                with quiet_libraries():
                    local = LocalModel(config.model, config.lora, seed=0)
                local.initial_global_model(setup_module.make_method(config)).save(model)
            measured["start"], more = start(model, options.repeats)
            targets += more
    finish(targets, options.json, CONSOLE, "transformers", "peft", **measured)


if __name__ == "__main__":
    main()
