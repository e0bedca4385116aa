"""The package on a GPU: exactness, a client's speed and memory, aggregation of an 8B round.

    python benchmarks/gpu.py [--minutes 5.5] [--sizes 1B 8B 8B-nf4 8B-long 3B ...]
                             [--only rounds residuals training aggregation]
                             [--device cuda] [--json FILE]         (`make bench-gpu`)
    python benchmarks/gpu.py --tiny             tiny shapes, on the CPU too, in seconds
    python benchmarks/gpu.py --render FILE      Markdown for docs/appendix/performance.md

No network is needed: weights of real shapes are drawn on the device. The parts:

- rounds: a small Llama is trained from scratch, then federated; exactness, applied share and
  exports, in float32 and bfloat16, with TF32 and without.
- residuals: what the forward pass of one layer gives of many small residuals.
- training: for each size, tokens/s and peak memory of a client and of a plain PEFT loop (with
  `-nf4`, of QLoRA; with `-long`, of gradient checkpointing), the plan, and the share of probes in
  a client's round.
- aggregation: a round of Llama-3.1-8B's adapters on the device, on the CPU of the same machine,
  and the published way on the device.

A size that would not end in time, judged by the one before, is left out and named. The file is
written after every part: what is measured stays measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers
from common import Target, environment, print_targets, write_json
from gpu_aggregation import CLIENTS, LAYERS, measure_aggregation, ranks
from gpu_models import (
    SIZES,
    TINY_SIZES,
    Budget,
    Size,
    describe_device,
    free_memory,
    scratch_folder,
)
from gpu_rounds import measure_residuals, measure_rounds, ways, write_trained_model
from gpu_tables import tables
from gpu_training import measure_size
from rich.console import Console

CONSOLE = Console()
PARTS = ("rounds", "residuals", "training", "aggregation")
FLOOR = 0.8
"""A size is expected to take at least this fraction of its usual time."""
RESERVE = 75.0
"""Seconds that the sizes leave for the aggregation after them."""


class Report:
    """What is measured so far, written after every part.

    Args:
        device: What is measured.
        file: Takes the numbers as JSON; None for none.
        tiny: Whether the shapes are tiny, and the numbers say nothing.
    """

    def __init__(self, device: torch.device, file: Path | None, *, tiny: bool) -> None:
        self.device = device
        self.targets: list[Target] = []
        self.measured: dict[str, Any] = {
            "environment": {
                **environment("transformers", "peft", "accelerate"),
                "device": describe_device(device),
            },
            "tiny": tiny,
            "seconds": {},
            "total_seconds": 0.0,
            "skipped": {},
            "failed": {},
        }
        self._file = file
        self._started = time.perf_counter()

    def run(self, name: str, part: Callable[[], tuple[Any, list[Target]]]) -> Any:
        """Run one part; one that fails is named, with the reason, and the others still run.

        Args:
            name: What the part is called.
            part: Returns its numbers and its targets.

        Returns:
            The numbers; None of a part that failed.
        """
        CONSOLE.print(f"{name} ...", highlight=False)
        started = time.perf_counter()
        numbers = None
        try:
            numbers, targets = part()
            self.targets += targets
        except Exception as error:
            first, *_ = str(error).splitlines() or [""]
            self.measured["failed"][name] = f"{type(error).__name__}: {first}"
            traceback.print_exc()
        self.measured["seconds"][name] = time.perf_counter() - started
        free_memory(self.device)
        return numbers

    def skip(self, name: str, reason: str) -> None:
        """Say that a part is not measured, and why."""
        CONSOLE.print(f"{name} is left out: {reason}", highlight=False, soft_wrap=True)
        self.measured["skipped"][name] = reason

    def keep(self, **measured: Any) -> None:
        """Take in the numbers of parts that did not fail, and write everything."""
        self.measured.update({name: numbers for name, numbers in measured.items() if numbers})
        self.measured["total_seconds"] = time.perf_counter() - self._started
        if self._file:
            write_json(self._file, targets=self.targets, **self.measured)


def run_all(
    device: torch.device,
    parts: Sequence[str],
    sizes: Sequence[Size],
    budget: Budget,
    report: Report,
) -> None:
    """Run the parts that were asked for, each within what is left of the time."""
    tiny = report.measured["tiny"]
    with tempfile.TemporaryDirectory(prefix="fedmomentum-gpu-") as name:
        folder = Path(name)
        os.environ["FEDMOMENTUM_CACHE"] = str(
            folder / "cache"
        )  # of models that are gone afterwards
        if "rounds" in parts:
            run_rounds(device, folder, report)
        if "residuals" in parts:
            report.keep(
                residuals=report.run(
                    "residuals", lambda: measure_residuals(folder, device, tiny=tiny)
                )
            )
        if "training" in parts:
            run_sizes(device, sizes, budget, RESERVE if "aggregation" in parts else 0.0, report)
        if "aggregation" in parts:
            run_aggregation(device, budget, report)


def run_rounds(device: torch.device, folder: Path, report: Report) -> None:
    """Measure the small federation in one way after the other."""
    tiny = report.measured["tiny"]
    pretrained = report.run(
        "small model", lambda: (write_trained_model(folder / "base", device, tiny=tiny), [])
    )
    if pretrained is None:
        return
    rows: list[dict[str, Any]] = []
    for way in ways(tiny=tiny):
        row = report.run(way.name, partial(measure_rounds, folder, way, device, tiny=tiny))
        if row:
            rows.append(row)
            report.keep(rounds={"pretrained": pretrained, "rows": rows})


def run_aggregation(device: torch.device, budget: Budget, report: Report) -> None:
    """Measure aggregations of one rank after the other."""
    tiny = report.measured["tiny"]
    modules: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    for rank in ranks(tiny=tiny):
        name = f"aggregation, rank {rank}"
        measured = report.run(name, partial(measure_aggregation, rank, device, budget, tiny=tiny))
        if measured:
            modules += measured["modules"]
            rounds += measured["rounds"]
            both = {"modules": modules, "rounds": rounds}
            report.keep(aggregation={"clients": CLIENTS, "layers": LAYERS, **both})


def run_sizes(
    device: torch.device, sizes: Sequence[Size], budget: Budget, reserve: float, report: Report
) -> None:
    """Measure the sizes in the order given, as far as the time allows.

    Args:
        device: What is measured.
        sizes: Which.
        budget: The time of the whole run.
        reserve: Seconds of it that are for others.
        report: Takes the numbers.
    """
    results: list[dict[str, Any]] = []
    slower = 1.0  # than expected, the size before
    for size in sizes:
        name = f"training, {size.name}"
        wanted = size.seconds * slower
        left = budget.left() - reserve
        if wanted > left:
            report.skip(
                name,
                f"it would take about {wanted:.0f} s, and {max(0.0, left):.0f} s were left for it",
            )
            continue
        started = time.perf_counter()
        with scratch_folder(2 * size.parameters()) as folder:
            measured = report.run(name, partial(measure_size, size, folder, device, budget))
        if measured:
            results.append(measured)
            evaluation = measured["round"]["evaluate_task"] or {
                "whole": 0.0
            }  # is done only where there is time for it
            took = time.perf_counter() - started - evaluation["whole"]
            slower = max(FLOOR, took / size.seconds)
        report.keep(training=results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, or render a file; return 1 if one failed.

    Args:
        arguments: Of the command line; those of this process by default.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=[*SIZES, *TINY_SIZES],
        help="in this order [default: 1B 8B 1B-nf4 3B; with --tiny: tiny]",
    )
    parser.add_argument(
        "--minutes", type=float, default=5.5, help="nothing is begun that would end later"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, on the CPU if there is no GPU"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--render", type=Path, help="print the Markdown of such a file, and measure nothing"
    )
    chosen = parser.parse_args(arguments)
    if chosen.render:
        print(tables(json.loads(chosen.render.read_text())), end="")
        return 0
    if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
        if not chosen.tiny:
            parser.error(
                "torch sees no GPU here; --tiny runs everything on the CPU with tiny shapes"
            )
        chosen.device = "cpu"
    device = torch.device(chosen.device)
    budget = Budget(60 * chosen.minutes)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Memory is collected after every part; what was imported need not be searched each time.
    gc.freeze()
    names = chosen.sizes or (["tiny"] if chosen.tiny else ["1B", "8B", "1B-nf4", "3B"])
    sizes = [{**SIZES, **TINY_SIZES}[name] for name in names]
    report = Report(device, chosen.json, tiny=chosen.tiny)
    run_all(device, chosen.only, sizes, budget, report)
    report.keep()
    CONSOLE.print(tables(report.measured), markup=False, highlight=False, soft_wrap=True)
    print_targets(report.targets, console=CONSOLE)
    return int(bool(report.measured["failed"]))


if __name__ == "__main__":
    sys.exit(main())
